// A call's tensors by name, as lora_kernels/operands/call.py has them: made of an operator's arguments once, and checked there
// for all implementations.

#pragma once

#include <tuple>

#include "weight.h"

namespace lora_kernels {

// A [R, K], B [N, R] and the factor on their product: a number, or a tensor in its place.
struct Adapter {
  Tensor a, b;
  OptionalTensor scaling_tensor;
  double scaling;
};

// A mask's key, [] of int64, and the drop threshold in 1/65536, at least 1. Its rows are those that are named, one for each of
// the input's, or the input's own.
struct Dropout {
  Tensor seed;
  uint32_t threshold;
  const int64_t* rows = nullptr;
};

// y = x WT + bias + scaling * D(x) AT BT, but for x; no dropout where D is nothing.
struct LinearCall {
  Weight weight;
  Adapter adapter;
  OptionalTensor bias;
  std::optional<Dropout> dropout;

  int64_t n() const { return weight.n; }
  int64_t k() const { return weight.k; }
  int64_t r() const { return adapter.a.size(0); }
};

// Which gradients a backward call is asked for.
struct Wanted {
  bool dx, da, db, dbias;
};

// An empty tensor stands for a gradient that is not wanted; none is another's alias.
struct Gradients {
  Tensor dx, da, db, dbias;
};

namespace arguments {

inline std::optional<Dropout> dropout_of(const OptionalTensor& seed, int64_t threshold) {
  STD_TORCH_CHECK(0 <= threshold && threshold < 65536, "threshold: expected 0 to 65535, got ", threshold);
  if (!seed || threshold == 0) return std::nullopt;
  return Dropout{*seed, static_cast<uint32_t>(threshold), nullptr};
}

inline Wanted wanted_of(const std::vector<bool>& flags) {
  STD_TORCH_CHECK(flags.size() == 4, "wanted: expected four, got ", flags.size());
  return {flags[0], flags[1], flags[2], flags[3]};
}

inline void check_dropout(const std::optional<Dropout>& dropout, const Tensor& v) {
  if (!dropout) return;
  const Tensor& seed = dropout->seed;
  check_memory("seed", seed, v);
  check_size(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed", "[] of int64", seed);
}

// A number in a tensor, or none.
inline void check_number(const char* name, const OptionalTensor& t, const Tensor& like) {
  if (!t) return;
  check_memory(name, *t, like);
  check_size(t->numel() == 1, name, "[]", *t);
}

// What forward and backward share, beside v: x [..., K] or dy [..., N].
inline void check_call(const Tensor& v, const LinearCall& call) {
  const Tensor &a = call.adapter.a, &b = call.adapter.b;
  check_weight(call.weight, v);
  check_memory("lora_A", a, v);
  check_memory("lora_B", b, v);
  check_size(a.dim() == 2 && a.size(1) == call.k(), "lora_A", "[R, K]", a);
  check_size(b.dim() == 2 && b.size(0) == call.n() && b.size(1) == a.size(0), "lora_B", "[N, R]", b);
  // Codes' own product is a call of rank 0.
  check_size(a.size(0) >= 1 || call.weight.is_quantised(), "lora_A", "[R, K] with R of at least 1", a);
  check_adapter_type("lora_A", a);
  check_adapter_type("lora_B", b);
  check_dropout(call.dropout, v);
  check_number("scaling", call.adapter.scaling_tensor, v);
}

// x [..., K] and bias [N] or none.
inline void check_forward(const Tensor& x, const LinearCall& call) {
  check_memory("x", x, x);
  check_call(x, call);
  check_size(x.dim() >= 1 && x.size(-1) == call.k(), "x", "[..., K]", x);
  if (!call.bias) return;
  check_memory("bias", *call.bias, x);
  check_size(call.bias->dim() == 1 && call.bias->size(0) == call.n(), "bias", "[N]", *call.bias);
  check_type("bias", *call.bias, x.scalar_type());
}

// dy [..., N]; x [..., K] and xa [M, R] where the wanted gradients need them.
inline void check_backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& xa, const LinearCall& call, const Wanted& wanted) {
  check_memory("dy", dy, dy);
  check_call(dy, call);
  check_size(dy.dim() >= 1 && dy.size(-1) == call.n(), "dy", "[..., N]", dy);
  STD_TORCH_CHECK(x || !wanted.da, "x: expected a tensor, which lora_A's gradient needs, got none");
  STD_TORCH_CHECK(xa || !wanted.db, "xa: expected a tensor, which lora_B's gradient needs, got none");
  const int64_t rows = dy.size(-1) ? dy.numel() / dy.size(-1) : -1;
  if (x) {
    check_memory("x", *x, dy);
    check_type("x", *x, dy.scalar_type());
    check_size(x->dim() >= 1 && x->size(-1) == call.k(), "x", "[..., K]", *x);
    check_size(rows < 0 || x->numel() == rows * call.k(), "x", "[..., K] with the rows of dy", *x);
  }
  if (xa) {
    check_memory("xa", *xa, dy);
    check_type("xa", *xa, dy.scalar_type());
    check_size(xa->dim() == 2 && xa->size(1) == call.r(), "xa", "[M, R]", *xa);
    check_size(rows < 0 || xa->size(0) == rows, "xa", "[M, R] with the rows of dy", *xa);
  }
}

}  // namespace arguments

// The boxed entries of an implementation's operators, by its bodies and the formats of W that they read. They alone take a
// call's parts one by one, in the schemas' order (lora_kernels/ops/linear.py).
template <std::tuple<Tensor, Tensor> (*body)(const Tensor&, const LinearCall&), const auto& formats>
std::tuple<Tensor, Tensor> forward_operator(
    Tensor x, Tensor weight, Parts parts, arguments::Format format, Tensor lora_A, Tensor lora_B, OptionalTensor bias,
    OptionalTensor seed, int64_t threshold, OptionalTensor scaling_tensor, double scaling) {
  const LinearCall call{arguments::weight_of(std::move(weight), std::move(parts), format),
                        {std::move(lora_A), std::move(lora_B), std::move(scaling_tensor), scaling},
                        std::move(bias),
                        arguments::dropout_of(seed, threshold)};
  arguments::check_format(call.weight, formats);
  arguments::check_forward(x, call);
  return body(x, call);
}

template <Gradients (*body)(const Tensor&, const OptionalTensor&, const OptionalTensor&, const LinearCall&, const Wanted&),
          const auto& formats>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_operator(
    Tensor dy, OptionalTensor x, OptionalTensor xa, Tensor weight, Parts parts, arguments::Format format, Tensor lora_A,
    Tensor lora_B, OptionalTensor seed, int64_t threshold, OptionalTensor scaling_tensor, double scaling,
    std::vector<bool> flags) {
  const LinearCall call{arguments::weight_of(std::move(weight), std::move(parts), format),
                        {std::move(lora_A), std::move(lora_B), std::move(scaling_tensor), scaling},
                        std::nullopt,
                        arguments::dropout_of(seed, threshold)};
  const Wanted wanted = arguments::wanted_of(flags);
  arguments::check_format(call.weight, formats);
  arguments::check_backward(dy, x, xa, call, wanted);
  const Gradients gradients = body(dy, x, xa, call, wanted);
  return {gradients.dx, gradients.da, gradients.db, gradients.dbias};
}

}  // namespace lora_kernels

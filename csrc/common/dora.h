// A DoRA call's tensors by name, as lora_kernels/operands/dora.py has them, checked for all implementations; call.h has the
// layer that it rescales.

#pragma once

#include "call.h"

namespace lora_kernels {

// y = x WT + bias + scaling * xa BT + (g - 1) * u, but for x; g is magnitude / norm, of a row of W.
struct DoraCall {
  LinearCall linear;
  Tensor magnitude;
};

// What backward reads of a forward call: x, xa [M, R] and u [M, N] where wanted, norm [N].
struct DoraKept {
  OptionalTensor x, xa, u;
  Tensor norm;
};

struct DoraWanted {
  bool dx, da, db, dbias, dm;
};

// An empty tensor stands for a gradient that is not wanted; none is another's alias.
struct DoraGradients {
  Tensor dx, da, db, dbias, dm;
};

namespace arguments {

inline DoraWanted dora_wanted_of(const std::vector<bool>& flags) {
  STD_TORCH_CHECK(flags.size() == 5, "wanted: expected five, got ", flags.size());
  return {flags[0], flags[1], flags[2], flags[3], flags[4]};
}

// A number for each row of W, beside v: x or dy.
inline void check_row_numbers(const char* name, const Tensor& t, const Tensor& v, const LinearCall& call) {
  check_memory(name, t, v);
  check_size(t.dim() == 1 && t.size(0) == call.n(), name, "[N]", t);
}

inline void check_forward(const Tensor& x, const DoraCall& call) {
  check_forward(x, call.linear);
  check_row_numbers("magnitude", call.magnitude, x, call.linear);
  check_adapter_type("magnitude", call.magnitude);
}

inline void check_backward(const Tensor& dy, const DoraKept& kept, const DoraCall& call, const DoraWanted& wanted) {
  check_backward(dy, kept.x, kept.xa, call.linear, {wanted.dx, wanted.da, wanted.db, wanted.dbias});
  check_row_numbers("magnitude", call.magnitude, dy, call.linear);
  check_adapter_type("magnitude", call.magnitude);
  check_row_numbers("norm", kept.norm, dy, call.linear);
  check_type("norm", kept.norm, ScalarType::Float);
  STD_TORCH_CHECK(kept.u || !wanted.dm, "u: expected a tensor, which magnitude's gradient needs, got none");
  if (!kept.u) return;
  const Tensor& u = *kept.u;
  check_memory("u", u, dy);
  check_type("u", u, dy.scalar_type());
  check_size(u.dim() == 2 && u.size(1) == call.linear.n() && u.numel() == dy.numel(), "u", "[M, N] with the rows of dy", u);
}

}  // namespace arguments

// The boxed entries of an implementation's operators, in the schemas' order (lora_kernels/ops/dora.py).
template <std::tuple<Tensor, Tensor, Tensor, Tensor> (*body)(const Tensor&, const DoraCall&), const auto& formats>
std::tuple<Tensor, Tensor, Tensor, Tensor> dora_forward_operator(
    Tensor x, Tensor magnitude, Tensor weight, Parts parts, arguments::Format format, Tensor lora_A, Tensor lora_B,
    OptionalTensor bias, OptionalTensor seed, int64_t threshold, OptionalTensor scaling_tensor, double scaling) {
  const DoraCall call{{arguments::weight_of(std::move(weight), std::move(parts), format),
                       {std::move(lora_A), std::move(lora_B), std::move(scaling_tensor), scaling},
                       std::move(bias),
                       arguments::dropout_of(seed, threshold)},
                      std::move(magnitude)};
  arguments::check_format(call.linear.weight, formats);
  arguments::check_forward(x, call);
  return body(x, call);
}

template <DoraGradients (*body)(const Tensor&, const DoraKept&, const DoraCall&, const DoraWanted&), const auto& formats>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dora_backward_operator(
    Tensor dy, OptionalTensor x, OptionalTensor xa, OptionalTensor u, Tensor norm, Tensor magnitude, Tensor weight,
    Parts parts, arguments::Format format, Tensor lora_A, Tensor lora_B, OptionalTensor seed, int64_t threshold,
    OptionalTensor scaling_tensor, double scaling, std::vector<bool> flags) {
  const DoraCall call{{arguments::weight_of(std::move(weight), std::move(parts), format),
                       {std::move(lora_A), std::move(lora_B), std::move(scaling_tensor), scaling},
                       std::nullopt,
                       arguments::dropout_of(seed, threshold)},
                      std::move(magnitude)};
  const DoraKept kept{std::move(x), std::move(xa), std::move(u), std::move(norm)};
  const DoraWanted wanted = arguments::dora_wanted_of(flags);
  arguments::check_format(call.linear.weight, formats);
  arguments::check_backward(dy, kept, call, wanted);
  const DoraGradients gradients = body(dy, kept, call, wanted);
  return {gradients.dx, gradients.da, gradients.db, gradients.dbias, gradients.dm};
}

}  // namespace lora_kernels

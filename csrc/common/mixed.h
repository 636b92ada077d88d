// A mixed call's tensors by name, as lora_kernels/operands/mixed.py has them: made of an operator's arguments once, and checked
// there.

#pragma once

#include "grouped.h"

namespace lora_kernels {

// y[m] = x[m] WT + bias + scaling[o] * D(x[m]) A[o]T B[o]T, o the owner of the sample that row m is of; W [N, K], A's [R, K] and
// B's [N, R] in the adapters' own memory, each with a rank of its own.
struct MixedCall {
  Tensor weight;
  std::vector<Tensor> a, b;
  std::vector<double> scalings;
  OptionalTensor bias;
  std::optional<Dropout> dropout;
  int64_t ranks;  // the largest R
  std::vector<Span> spans;  // each adapter's places in `order`, of those that have rows
  std::vector<int64_t> order;  // rows by adapter

  int64_t n() const { return weight.size(0); }
  int64_t k() const { return weight.size(1); }
};

namespace arguments {

// What adapters of a call have beside v: x [M, K] or dy [M, N].
inline void check_mixed(const char* name, const Tensor& v, const MixedCall& call) {
  const Tensor& w = call.weight;
  check_memory(name, v, v);
  check_memory("weight", w, v);
  check_size(v.dim() == 2, name, "two dimensions", v);
  check_size(w.dim() == 2, "weight", "[N, K]", w);
  check_type("weight", w, v.scalar_type());
  const size_t count = call.a.size();
  STD_TORCH_CHECK(count == call.b.size(), "lora_B: expected ", count, " tensors, got ", call.b.size());
  for (size_t i = 0; i < count; ++i) {
    const Tensor &a = call.a[i], &b = call.b[i];
    check_memory("lora_A", a, v);
    check_memory("lora_B", b, v);
    check_size(a.dim() == 2 && a.size(0) >= 1 && a.size(1) == call.k(), "lora_A", "[R, K]", a);
    check_size(b.dim() == 2 && b.size(0) == call.n() && b.size(1) == a.size(0), "lora_B", "[N, R]", b);
    check_adapter_type("lora_A", a);
    check_adapter_type("lora_B", b);
  }
  if (call.bias) {
    check_memory("bias", *call.bias, v);
    check_type("bias", *call.bias, v.scalar_type());
    check_size(call.bias->dim() == 1 && call.bias->size(0) == call.n(), "bias", "[N]", *call.bias);
  }
  check_dropout(call.dropout, v);
}

// Reads scalings and owners, and sorts rows by owner: those of a sample are one after the other.
inline void read_owners(MixedCall& call, const Tensor& v, const Tensor& scalings, const Tensor& owners) {
  const auto count = static_cast<int64_t>(call.a.size());
  check_memory("scalings", scalings, v);
  const bool doubles = scalings.scalar_type() == ScalarType::Double && scalings.is_contiguous();
  check_size(doubles && scalings.dim() == 1 && scalings.size(0) == count, "scalings", "[adapters] of float64", scalings);
  const double* const numbers = static_cast<const double*>(scalings.const_data_ptr());
  call.scalings.assign(numbers, numbers + count);
  for (const Tensor& a : call.a) call.ranks = std::max(call.ranks, a.size(0));
  const std::vector<int64_t> found = integers("owners", owners, -1, count, v);
  const auto samples = static_cast<int64_t>(found.size());
  const int64_t each = samples ? v.size(0) / samples : 0;
  STD_TORCH_CHECK(each * samples == v.size(0), "owners: expected a divisor of ", v.size(0), " rows, got ", samples);
  if (each == 0) return;
  call.order.reserve(static_cast<size_t>(v.size(0)));
  for (int64_t adapter = 0; adapter < count; ++adapter) {
    const auto begin = static_cast<int64_t>(call.order.size());
    for (int64_t s = 0; s < samples; ++s) {
      for (int64_t i = 0; found[static_cast<size_t>(s)] == adapter && i < each; ++i) call.order.push_back(s * each + i);
    }
    const auto end = static_cast<int64_t>(call.order.size());
    if (begin < end) call.spans.push_back({begin, end, adapter, 0});
  }
}

// x [M, K] and xa [M, ranks] beside dy, where the wanted gradients need them.
inline void check_mixed_backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& xa, const MixedCall& call, const Wanted& wanted) {
  STD_TORCH_CHECK(x || !wanted.da, "x: expected a tensor, which lora_A's gradient needs, got none");
  STD_TORCH_CHECK(xa || !wanted.db, "xa: expected a tensor, which lora_B's gradient needs, got none");
  const auto check = [&](const char* name, const char* expected, const OptionalTensor& t, int64_t columns) {
    if (!t) return;
    check_memory(name, *t, dy);
    check_type(name, *t, dy.scalar_type());
    check_size(t->dim() == 2 && t->size(0) == dy.size(0) && t->size(1) == columns, name, expected, *t);
  };
  check("x", "[M, K]", x, call.k());
  check("xa", "[M, ranks]", xa, call.ranks);
}

}  // namespace arguments

}  // namespace lora_kernels

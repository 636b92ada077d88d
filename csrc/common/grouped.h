// A grouped call's tensors by name, as lora_kernels/operands/grouped.py has them: made of an operator's arguments once, and
// checked there.

#pragma once

#include "call.h"

namespace lora_kernels {

// A group that has rows: sorted rows from begin to end; adapter -1 is none.
struct Span {
  int64_t begin, end, adapter, weight;
};

// What belongs to which group, read from the tensors that say so. rows and places are empty where a sorted row reads, or
// writes, its own.
struct Groups {
  std::vector<Span> spans;
  std::vector<int64_t> rows, places;
};

// y[to] = x[from] W[w]T + bias[w] + scaling[a] * D(x[from]) A[a]T B[a]T; W [G, N, K], A [G, R, K], B [G, N, R], bias [G, N].
struct GroupedCall {
  Tensor weight;
  Adapter adapter;
  OptionalTensor bias;
  std::optional<Dropout> dropout;
  int64_t tokens, count;  // rows of x, sorted rows
  Groups groups;

  int64_t n() const { return weight.size(1); }
  int64_t k() const { return weight.size(2); }
  int64_t r() const { return adapter.a.size(1); }
};

namespace arguments {

// The integers of a vector, each at least `least` and below `limit`.
inline std::vector<int64_t> integers(
    const char* name, const Tensor& t, int64_t least, int64_t limit, const Tensor& like) {
  check_memory(name, t, like);
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, name, ": expected int32 or int64");
  check_size(t.dim() == 1, name, "[S] or [G]", t);
  const int64_t count = t.size(0), by = t.stride(0);
  const void* const data = t.const_data_ptr();
  std::vector<int64_t> found(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t number =
        type == ScalarType::Int ? static_cast<const int32_t*>(data)[i * by] : static_cast<const int64_t*>(data)[i * by];
    STD_TORCH_CHECK(
        least <= number && number < limit, name, ": expected numbers from ", least, " to ", limit - 1, ", got ", number);
    found[static_cast<size_t>(i)] = number;
  }
  return found;
}

// Each group's number, its own where the tensor is none.
inline std::vector<int64_t> numbers_of_groups(
    const char* name, const OptionalTensor& t, size_t groups, int64_t least, int64_t limit, const Tensor& like) {
  std::vector<int64_t> found;
  if (t) {
    found = integers(name, *t, least, limit, like);
  } else {
    for (size_t i = 0; i < groups; ++i) found.push_back(static_cast<int64_t>(i));
    STD_TORCH_CHECK(static_cast<int64_t>(groups) <= limit, name, ": expected numbers below ", limit, ", got none");
  }
  STD_TORCH_CHECK(found.size() == groups, name, ": expected ", groups, " numbers, got ", found.size());
  return found;
}

inline Groups groups_of(
    const GroupedCall& call, const Tensor& offsets, const OptionalTensor& rows, const OptionalTensor& scatter,
    const OptionalTensor& adapters, const OptionalTensor& weights) {
  const Tensor& like = call.weight;
  Groups groups{};
  const std::vector<int64_t> ends = integers("offsets", offsets, 0, call.count + 1, like);
  const auto of = numbers_of_groups("adapters", adapters, ends.size(), -1, call.adapter.a.size(0), like);
  const auto by = numbers_of_groups("weights", weights, ends.size(), 0, call.weight.size(0), like);
  int64_t begin = 0;
  for (size_t i = 0; i < ends.size(); ++i) {
    STD_TORCH_CHECK(begin <= ends[i], "offsets: expected ends in ascending order, got ", ends[i], " after ", begin);
    if (begin < ends[i]) groups.spans.push_back({begin, ends[i], of[i], by[i]});
    begin = ends[i];
  }
  if (rows) groups.rows = integers("rows", *rows, 0, call.tokens, like);
  if (scatter) groups.places = integers("scatter", *scatter, 0, call.count, like);
  STD_TORCH_CHECK(!scatter || scatter->size(0) == call.count, "scatter: expected ", call.count, " numbers");
  return groups;
}

// Both directions, beside v: x [T, K] or dy [S, N].
inline void check_grouped(const char* name, const Tensor& v, const GroupedCall& call) {
  const Tensor &w = call.weight, &a = call.adapter.a, &b = call.adapter.b;
  check_memory(name, v, v);
  check_memory("weight", w, v);
  check_memory("lora_A", a, v);
  check_memory("lora_B", b, v);
  check_size(v.dim() == 2, name, "two dimensions", v);
  check_size(w.dim() == 3, "weight", "[G, N, K]", w);
  check_type("weight", w, v.scalar_type());
  check_size(a.dim() == 3 && a.size(1) >= 1 && a.size(2) == call.k(), "lora_A", "[G, R, K]", a);
  const bool fits = b.dim() == 3 && b.size(0) == a.size(0) && b.size(1) == call.n() && b.size(2) == a.size(1);
  check_size(fits, "lora_B", "[G, N, R]", b);
  check_adapter_type("lora_A", a);
  check_adapter_type("lora_B", b);
  if (call.bias) {
    check_memory("bias", *call.bias, v);
    check_type("bias", *call.bias, v.scalar_type());
    const Tensor& bias = *call.bias;
    check_size(bias.dim() == 2 && bias.size(0) == w.size(0) && bias.size(1) == call.n(), "bias", "[G, N]", bias);
  }
  check_dropout(call.dropout, v);
  if (const OptionalTensor& scaling = call.adapter.scaling_tensor) {
    check_memory("scaling", *scaling, v);
    check_size(scaling->dim() == 0 || (scaling->dim() == 1 && scaling->size(0) == a.size(0)), "scaling", "[] or [G]", *scaling);
  }
}

// x [tokens, K] and xa [count, R] beside dy, where the wanted gradients need them.
inline void check_grouped_backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& xa, const GroupedCall& call, const Wanted& wanted) {
  check_grouped("dy", dy, call);
  check_size(dy.size(0) == call.count && dy.size(1) == call.n(), "dy", "[S, N]", dy);
  STD_TORCH_CHECK(x || !wanted.da, "x: expected a tensor, which lora_A's gradient needs, got none");
  STD_TORCH_CHECK(xa || !wanted.db, "xa: expected a tensor, which lora_B's gradient needs, got none");
  const auto check = [&](const char* name, const char* expected, const OptionalTensor& t, int64_t rows, int64_t columns) {
    if (!t) return;
    check_memory(name, *t, dy);
    check_type(name, *t, dy.scalar_type());
    check_size(t->dim() == 2 && t->size(0) == rows && t->size(1) == columns, name, expected, *t);
  };
  check("x", "[T, K]", x, call.tokens, call.k());
  check("xa", "[S, R]", xa, call.count, call.r());
}

}  // namespace arguments

}  // namespace lora_kernels

// Rows of matrices by number; see rows.h.

#include "rows.h"

#include <algorithm>
#include <functional>
#include <optional>

#include "parallel.h"

namespace lora_kernels {

namespace {

float* floats_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Adds rows of so many numbers, float32 or bfloat16, to the float32 rows that `row` gives, one after the other.
template <class F>
void add_each(const Tensor& rows, int64_t count, int64_t columns, const Tensor& to, F row) {
  const bool is_float = rows.scalar_type() == ScalarType::Float;
  std::optional<Buffer<float>> copied;
  if (!is_float) copied = padded_floats(rows, columns);
  const float* const from = is_float ? floats_of(rows) : copied->get();
  for (int64_t i = 0; i < count; ++i) {
    float* const into = floats_of(to) + row(i) * columns;
    std::transform(into, into + columns, from + i * columns, into, std::plus<>());
  }
}

}  // namespace

Tensor part_of(const Tensor& stack, int64_t i) {
  const auto sizes = stack.sizes(), strides = stack.strides();
  return reinterpreted(stack, {sizes.begin() + 1, sizes.end()}, {strides.begin() + 1, strides.end()}, i * strides[0]);
}

Tensor rows_of(const Tensor& v, const std::vector<int64_t>& named, int64_t begin, int64_t end) {
  const int64_t columns = v.size(1);
  if (named.empty()) return reinterpreted(v, {end - begin, columns}, {v.stride(0), v.stride(1)}, begin * v.stride(0));
  const Tensor rows = as_matrix(v), out = empty_matrix(end - begin, columns, v.scalar_type());
  const auto bytes = static_cast<int64_t>(v.element_size()), by_row = rows.stride(0) * bytes;
  const char* const from = static_cast<const char*>(rows.const_data_ptr());
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  in_parallel(end - begin, kRowGroup, columns, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      std::memcpy(to + i * columns * bytes, from + named[begin + i] * by_row, columns * bytes);
    }
  });
  return out;
}

void copy_rows(const Tensor& v, const std::vector<int64_t>& named, int64_t begin, int64_t end, const Tensor& to) {
  const auto size = static_cast<int64_t>(v.element_size());
  const int64_t columns = v.size(1), apart = v.stride(0) * size, step = v.stride(1) * size;
  const char* const from = static_cast<const char*>(v.const_data_ptr());
  char* into = static_cast<char*>(to.mutable_data_ptr()) + begin * columns * size;
  for (int64_t i = begin; i < end; ++i, into += columns * size) {
    const char* const row = from + named[static_cast<size_t>(i)] * apart;
    if (step == size) {
      std::memcpy(into, row, columns * size);
      continue;
    }
    for (int64_t c = 0; c < columns; ++c) std::memcpy(into + c * size, row + c * step, size);
  }
}

Tensor stack_of(const std::vector<int64_t>& sizes, ScalarType type, bool zeroed) {
  const Tensor out = empty(sizes, type);
  if (zeroed && out.numel()) std::memset(out.mutable_data_ptr(), 0, out.numel() * out.element_size());
  return out;
}

Tensor columns_of(const Tensor& v, int64_t count) {
  return reinterpreted(v, {v.size(0), count}, {v.stride(0), v.stride(1)});
}

void put_rows(const Tensor& rows, const Tensor& to, const std::vector<int64_t>& named, int64_t begin) {
  const auto size = static_cast<int64_t>(to.element_size()), bytes = size * rows.size(1), apart = size * to.size(1);
  const char* const from = static_cast<const char*>(rows.const_data_ptr());
  char* const into = static_cast<char*>(to.mutable_data_ptr());
  in_parallel(rows.size(0), kRowGroup, to.size(1), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = named.empty() ? begin + i : named[begin + i];
      std::memcpy(into + row * apart, from + i * bytes, bytes);
    }
  });
}

void add_rows(const Tensor& rows, const Tensor& to, const std::vector<int64_t>& named, int64_t begin) {
  // By one thread: rows may be named twice.
  add_each(rows, rows.size(0), to.size(1), to, [&](int64_t i) { return named.empty() ? begin + i : named[begin + i]; });
}

void add_part(const Tensor& part, const Tensor& stack, int64_t i) {
  const int64_t count = part.numel();
  add_each(torch::stable::reshape(part, {1, count}), 1, count, stack, [i](int64_t) { return i; });
}

}  // namespace lora_kernels

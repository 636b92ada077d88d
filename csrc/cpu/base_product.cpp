// The products with the frozen weight: the library's, but for a few rows, where it leaves most of the
// memory's bandwidth unused.

#include "base_product.h"

#include <algorithm>
#include <functional>

#include "library_product.h"
#include "parallel.h"
#include "quantised_product.h"

namespace lora_kernels {

namespace {

// 2026-11-24, Zen 5, one thread, 2048x2048 out of cache: forward 0.54 of the library's time for 1 row and 0.84 for 16 (bfloat16),
// 0.73 for 1 and 0.91 for 4 (float32); dy W 0.55 for 16 and 0.67 for 32, 0.65 for 16 and 0.86 for 64. 2026-11-26, Xeon, whose
// matrix unit the library takes, bfloat16, one and two threads: forward 0.4 to 0.7 for 1 row, 0.6 to 0.9 for 4, 1.6 to 2.4 for 16;
// dy W 0.4 to 0.9 for 1, 0.5 to 0.8 for 16, 0.9 to 1.4 for 24.
constexpr OwnRows kForwardBf16{{1, 16}, {1, 4}}, kForwardFloat{{1, 4}, {1, 4}};
constexpr OwnRows kBackwardBf16{{1, 32}, {1, 16}}, kBackwardFloat{{4, 64}, {4, 64}};
// Of float32 dy W alone where W comes from memory, too. 2026-11-30, Zen 3, one thread, 1 to 64 rows: 0.7 to 0.9 of the
// library's time at 2048x2048, 0.9 to 1.4 of it at 384x512 and 768x768, which a cache holds.
constexpr int64_t kLargeWeight = 1 << 21;
// x times a weight stored as [K, N]. 2026-11-29, Zen 3: 0.06 to 0.5 of the library's time in bfloat16, 0.95 to 1.5 in
// float32.
constexpr OwnRows kStoredBf16 = kBackwardBf16, kStoredFloat{{1, 0}, {1, 0}};

bool within(const Tensor& v, const Tensor& weight, OwnRows of_bf16, OwnRows of_float) {
  return own_rows(v, of_bf16, of_float).holds(v.size(0)) && weight.size(0) >= kRowGroup;
}

// Whether the columns of w are what lies adjacent in memory, as in the view of a weight stored as [K, N].
bool by_columns(const Tensor& w) { return w.size(1) > 1 && w.stride(1) != 1 && w.stride(0) == 1; }

// v wT + bias, for w with adjacent rows.
Tensor times_transposed(const Tensor& v, const Tensor& w, const OptionalTensor& bias) {
  if (!within(v, w, kForwardBf16, kForwardFloat)) return library_product(v, transposed(w), bias);
  const int64_t m = v.size(0), n = w.size(0);
  const Tensor y = empty_matrix(m, n, v.scalar_type());
  const OptionalTensor added = bias ? OptionalTensor(torch::stable::contiguous(*bias)) : std::nullopt;
  const Matrix from = added ? row_matrix(*added) : Matrix{};
  in_parallel(n, kRowGroup, m * w.size(1), [&](int64_t begin, int64_t end) {
    kernels().few_rows(matrix(v), matrix(w), from, matrix(y), begin, end);
  });
  return y;
}

// v w + bias, for w with adjacent rows; by the package's own products for as many rows of v as are named.
Tensor times(const Tensor& v, const Tensor& w, const OptionalTensor& bias, OwnRows of_bf16, OwnRows of_float) {
  const bool from_cache = v.scalar_type() == ScalarType::Float && w.size(0) * w.size(1) < kLargeWeight;
  if (from_cache || !within(v, w, of_bf16, of_float)) return library_product(v, w, bias);
  const int64_t m = v.size(0), n = w.size(1), stride = round_up(m, kLanes);
  const Buffer<float> columns = to_columns(v, stride);
  const Sums sums(stride, n);
  column_sums(w, {columns.get(), stride}, sums);
  if (bias) {
    const Buffer<float> added = padded_floats(torch::stable::reshape(*bias, {1, n}), n);
    for (int64_t i = 0; i < m; ++i) {
      float* const to = sums.data.get() + i * sums.pitch;
      std::transform(to, to + n, added.get(), to, std::plus<>());
    }
  }
  return sums.as_rows(m, v, 1);
}

}  // namespace

void check_packed(const Weight& weight, int64_t rows, int64_t columns, const Tensor& like) {
  if (!weight.parts || weight.is_quantised()) return;
  int64_t sum = 0;
  for (const Tensor& part : *weight.parts) {
    STD_TORCH_CHECK(
        part.dim() == 2 && part.size(0) == rows && part.scalar_type() == like.scalar_type(),
        "parts: expected tensors of ", rows, " rows in the dtype of the other tensors");
    sum += part.size(1);
  }
  STD_TORCH_CHECK(sum == columns, "parts: expected ", columns, " columns in all, got ", sum);
}

Tensor base_forward(const Tensor& x, const LinearCall& call) {
  if (call.weight.is_quantised()) return quantised_forward(x, call.weight, call.bias);
  const Tensor& w = call.weight.matrix;
  const Parts& parts = call.weight.parts;
  // Few rows of float32 take 0.6 to 0.8 of the time that they take with a packed weight, and err half
  // as much; of bfloat16 0.7 to 1.2. 2026-11-26, Xeon, three sizes. Not where W would be copied.
  const bool beats_packed =
      within(x, w, kForwardBf16, kForwardFloat) && x.scalar_type() == ScalarType::Float && w.stride(1) == 1;
  if (parts && x.size(0) > 0 && !beats_packed) return packed_linear(x, *parts, call.bias);
  if (by_columns(w)) return times(x, transposed(w), call.bias, kStoredBf16, kStoredFloat);
  return times_transposed(x, as_matrix(w), call.bias);
}

Tensor base_backward(const Tensor& dy, const Weight& weight) {
  if (weight.is_quantised()) return quantised_backward(dy, weight);
  const Tensor& w = weight.matrix;
  const Parts& parts = weight.parts;
  if (parts && dy.size(0) > 0) return packed_linear(dy, *parts, std::nullopt);
  if (by_columns(w)) return times_transposed(dy, transposed(w), std::nullopt);
  return times(dy, as_matrix(w), std::nullopt, kBackwardBf16, kBackwardFloat);
}

}  // namespace lora_kernels

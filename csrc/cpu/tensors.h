// Between torch's tensors and the kernels' matrices.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "../common/as_matrix.h"
#include "kernels.h"

namespace lora_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Float32 rows, `stride` numbers each, zero beyond those that count.
struct FloatRows {
  const float* data;
  int64_t stride;
};

// as_matrix for the left operand of a large product. On processors with AMX oneDNN 3.12 reads on beyond a row's last
// columns, by a zero, but a NaN in the gap between two rows spreads: such rows are copied.
Tensor left_operand(const Tensor& v);

// Raises unless v is of a type that the kernels compute in.
void check_served(const char* name, const Tensor& v);

// The same numbers as float32.
Tensor as_floats(const Tensor& t);

// lora_A or lora_B rounded to the type that the products take, that of x.
Tensor factor(const Tensor& parameter, const Tensor& x);

// An uninitialised contiguous tensor of at least one dimension.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType type);
Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType type);

// Stands for a gradient of v, or of what goes with it, that is not wanted.
Tensor not_wanted(const Tensor& v);

// The view tT of a matrix.
Tensor transposed(const Tensor& t);

// flat [M, C], contiguous, with the leading dimensions of `like`.
Tensor shaped_like(const Tensor& like, const Tensor& flat);

// The numbers of a float32 or bfloat16 matrix.
Matrix matrix(const Tensor& t);

// The numbers of a contiguous vector, as one row.
Matrix row_matrix(const Tensor& t);

// `count` rows of a matrix, from the `first` on.
Matrix rows_of(const Matrix& m, int64_t first, int64_t count);

// The same as float32, without a gap between them.
void to_floats(const Matrix& m, int64_t first, int64_t count, float* out);

// Rows [begin, end) of q [., q_stride], rounded to the type of `out`, as many columns as it has.
void write_rows(const float* q, int64_t q_stride, const Tensor& out, int64_t begin, int64_t end);

// Adds numbers to row i of a matrix.
void add_floats(const float* numbers, const Tensor& to, int64_t i);

// Numbers as a vector of the parameter's size and type.
Tensor vector_like(const Tensor& parameter, const float* numbers);

// A matrix as float32 [rows, stride], zero beyond its columns.
Buffer<float> padded_floats(const Tensor& t, int64_t stride);

// A matrix [rows, columns] as float32 [columns, stride], zero beyond its rows.
Buffer<float> to_columns(const Tensor& t, int64_t stride);

// Float32 sums [ranks, columns], rows padded; by lines more, since a power of two would crowd few sets.
struct Sums {
  int64_t columns, pitch;
  Buffer<float> data;
  Sums(int64_t ranks, int64_t columns)
      : columns(columns), pitch(round_up(columns, kColumnBlock) + kLanes), data(ranks * pitch) {}

  // The first `rows` of them, times scale, in the parameter's type; or the same transposed.
  Tensor as_rows(int64_t rows, const Tensor& parameter, float scale) const;
  Tensor as_columns(int64_t rows, const Tensor& parameter, float scale) const;
};

// dx += D(q f) and sums = qT D(x); dx, or x with the sums, may be absent. The bits don't depend on the number of threads.
void column_pass(
    const OptionalTensor& dx, const OptionalTensor& x, const Panel& f, const FloatRows& q, const Mask& mask,
    const Sums& sums);

// sums = qT v.
void column_sums(const Tensor& v, const FloatRows& q, const Sums& sums);

}  // namespace lora_kernels

// Rows of matrices by number, and matrices of a stack.

#pragma once

#include <vector>

#include "tensors.h"

namespace lora_kernels {

// Matrix i of a stack [G, ., .], or row i of a matrix: a view.
Tensor part_of(const Tensor& stack, int64_t i);

// Rows [begin, end) of v: a view; or copies of the rows that `named` has there.
Tensor rows_of(const Tensor& v, const std::vector<int64_t>& named, int64_t begin, int64_t end);

// Copies rows `named` of v, whose columns may lie apart, to rows [begin, end) of `to`, of v's type and contiguous.
void copy_rows(const Tensor& v, const std::vector<int64_t>& named, int64_t begin, int64_t end, const Tensor& to);

// An uninitialised or zeroed contiguous tensor.
Tensor stack_of(const std::vector<int64_t>& sizes, ScalarType type, bool zeroed);

// The first `count` columns of a matrix: a view.
Tensor columns_of(const Tensor& v, int64_t count);

// Copies rows to the first columns of rows [begin, ...) of `to`, or of those that `named` has there. Both are of one type and
// contiguous.
void put_rows(const Tensor& rows, const Tensor& to, const std::vector<int64_t>& named, int64_t begin);

// Adds rows, float32 or bfloat16, likewise to float32.
void add_rows(const Tensor& rows, const Tensor& to, const std::vector<int64_t>& named, int64_t begin);

// Adds a matrix or row to float32 part i of a stack.
void add_part(const Tensor& part, const Tensor& stack, int64_t i);

}  // namespace lora_kernels

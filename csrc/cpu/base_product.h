// The products with the frozen weight.

#pragma once

#include <vector>

#include "tensors.h"

namespace lora_kernels {

// A weight in oneDNN's layout, in the parts of lora_kernels/operands/onednn.py; none of a dense one.
using Parts = std::optional<std::vector<Tensor>>;

// Refuses parts that aren't those of a matrix [rows, columns] in the type of `like`.
void check_parts(const Parts& parts, int64_t rows, int64_t columns, const Tensor& like);

// x WT + bias [M, N], for x [M, K], W [N, K], bias [N] or none; parts are W in oneDNN's layout.
Tensor base_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Parts& parts);

// dy W [M, K], for dy [M, N]; parts are WT in oneDNN's layout.
Tensor base_backward(const Tensor& dy, const Tensor& weight, const Parts& parts);

}  // namespace lora_kernels

// The products with the frozen weight.

#pragma once

#include <vector>

#include "tensors.h"

namespace lora_kernels {

// A weight in oneDNN's layout, in the parts of lora_kernels/impl/eager/onednn.py, or none.
using Packed = std::optional<std::vector<Tensor>>;

// Refuses packed parts that aren't those of a matrix [rows, columns] in the type of `like`.
void check_packed(const Packed& packed, int64_t rows, int64_t columns, const Tensor& like);

// x WT + bias [M, N], for x [M, K], W [N, K], bias [N] or none; packed is W in oneDNN's layout.
Tensor base_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Packed& packed);

// dy W [M, K], for dy [M, N]; packed is WT in oneDNN's layout.
Tensor base_backward(const Tensor& dy, const Tensor& weight, const Packed& packed);

}  // namespace lora_kernels

// The products with the frozen weight.

#pragma once

#include "tensors.h"

namespace lora_kernels {

// x WT + bias [M, N], for x [M, K], W [N, K], bias [N] or none; packed is W in oneDNN's layout.
Tensor base_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& packed);

// dy W [M, K], for dy [M, N]; packed is WT in oneDNN's layout.
Tensor base_backward(const Tensor& dy, const Tensor& weight, const OptionalTensor& packed);

}  // namespace lora_kernels

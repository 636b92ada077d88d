// The products with a frozen weight that is kept as codes.

#pragma once

#include "../common/weight.h"
#include "tensors.h"

namespace lora_kernels {

// x WT + bias [M, N], for x [M, K].
Tensor quantised_forward(const Tensor& x, const Weight& weight, const OptionalTensor& bias);

// dy W [M, K], for dy [M, N].
Tensor quantised_backward(const Tensor& dy, const Weight& weight);

}  // namespace lora_kernels

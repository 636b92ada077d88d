// The products with the frozen weight.

#pragma once

#include "../common/call.h"
#include "tensors.h"

namespace lora_kernels {

// Refuses a dense weight's parts that aren't those of a matrix [rows, columns] in oneDNN's layout
// (lora_kernels/operands/onednn.py), in the type of `like`.
void check_packed(const Weight& weight, int64_t rows, int64_t columns, const Tensor& like);

// x WT + bias [M, N], for x [M, K]; packed parts are W's.
Tensor base_forward(const Tensor& x, const LinearCall& call);

// dy W [M, K], for dy [M, N]; packed parts are WT's.
Tensor base_backward(const Tensor& dy, const Weight& weight);

}  // namespace lora_kernels

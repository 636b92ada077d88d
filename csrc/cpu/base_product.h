// The products with the frozen weight.

#pragma once

#include "../common/call.h"
#include "tensors.h"

namespace lora_kernels {

// Refuses parts that aren't those of a matrix [rows, columns] in oneDNN's layout (lora_kernels/operands/onednn.py), in the
// type of `like`.
void check_parts(const Parts& parts, int64_t rows, int64_t columns, const Tensor& like);

// x WT + bias [M, N], for x [M, K]; the weight's parts are W.
Tensor base_forward(const Tensor& x, const LinearCall& call);

// dy W [M, K], for dy [M, N]; the weight's parts are WT.
Tensor base_backward(const Tensor& dy, const Weight& weight);

}  // namespace lora_kernels

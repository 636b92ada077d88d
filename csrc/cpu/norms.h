// DoRA's norms.

#pragma once

#include "../common/call.h"
#include "tensors.h"

namespace lora_kernels {

// ||W + scale * B A|| of each row, [N] of float32, of W, A and B as they are stored.
Tensor row_norms(const LinearCall& call, float scale);

}  // namespace lora_kernels

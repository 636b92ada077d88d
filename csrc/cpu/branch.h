// The adapter branch, which the layers share: the mask, the factors, what backward adds and sums.

#pragma once

#include "../common/call.h"
#include "tensors.h"

namespace lora_kernels {

// Of a call without dropout it keeps everything.
Mask mask_of(const LinearCall& call);

// The factor of D.
float keep_scale(const Mask& mask);

// The factor on B A, a number or a tensor in its place.
float scale_of(const Adapter& adapter);

// Adds scaling * D(x) AT BT to y, for x's rows, and returns xa.
Tensor add_branch(const Tensor& y, const Tensor& rows, const LinearCall& call);

// The same of a few rows without dropout; it reads A and B as they lie, where panels of them would cost more than the products.
Tensor add_branch_of_few(const Tensor& y, const Tensor& rows, const LinearCall& call);

// Whether that takes the call, and takes less time.
bool has_few_rows(const Tensor& rows, const LinearCall& call);

// Adds D(dxa A) to dx, if that is wanted, and returns dA, if that is; dxa is scaling * dy B.
Tensor add_adapter(
    const Tensor& dx, const Tensor& dy_rows, const OptionalTensor& x, const LinearCall& call, const Wanted& wanted);

// dB = scaling * dyT xa.
Tensor gradient_of_b(const Tensor& dy_rows, const Tensor& xa, const LinearCall& call);

}  // namespace lora_kernels

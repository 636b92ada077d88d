// The adapted linear layer, for ops that are made of it.

#pragma once

#include "../common/call.h"
#include "tensors.h"

namespace lora_kernels {

// y [..., N] and xa [M, R]. The mask's rows are x's, or those that are named.
std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const LinearCall& call);

// The wanted gradients; x and xa where they need them.
Gradients linear_backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& xa, const LinearCall& call, const Wanted& wanted);

}  // namespace lora_kernels

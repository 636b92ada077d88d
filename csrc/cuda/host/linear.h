// lora_linear on a target: what is allocated, what each launch gets.

#pragma once

#include <array>

#include "../../common/call.h"

namespace lora_kernels {

inline constexpr std::array kLinearFormats{"dense", "nf4", "fp4"};  // of W

// y and xa.
std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const LinearCall& call);

Gradients linear_backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& xa, const LinearCall& call, const Wanted& wanted);

}  // namespace lora_kernels

// A call of the layer on CUDA tensors, or on any tensors for a machine that executes the kernels' code: what is
// allocated, what each launch gets.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <functional>
#include <optional>
#include <tuple>
#include <vector>

#include "plan.h"

namespace lora_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Where a call's launches go, and what it needs besides.
struct Target {
  Device device;
  // Memory of a shape and an element type, `like`'s own without one.
  std::function<Tensor(const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType>)> empty;
  // At least so many int32 zeros, which every launch leaves as it found them.
  std::function<Tensor(const Tensor& like, int count)> zeros;
  std::function<void(const Launch&, const void* params, size_t bytes)> launch;
  // Encodes where boxes are copied from.
  std::function<TensorMap(const Boxes&)> map;
  // Told of memory that launches use beyond inputs and outputs.
  std::function<void(const Tensor&)> scratch;
};

// The parameters that forward and backward share.
struct Parameters {
  Tensor weight, lora_A, lora_B;
  OptionalTensor seed, scaling_tensor;
  double scaling;
  int64_t threshold;
};

std::tuple<Tensor, Tensor> forward_call(
    const Tensor& x, const Parameters& parameters, const OptionalTensor& bias, const Target& target);

// dx, da, db and dbias; an empty tensor stands for a gradient not asked for. Once the launches are made, da and db
// are converted to their parameters' types by whoever made them.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_call(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& xa, const Parameters& parameters,
    const std::vector<bool>& needs, const Target& target);

}  // namespace lora_kernels

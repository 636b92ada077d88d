// A tensor as rows, as both compiled parts read it.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace lora_kernels {

// v [..., C] as [M, C]; a copy only where rows are not evenly spaced or their numbers not adjacent.
inline torch::stable::Tensor as_matrix(const torch::stable::Tensor& v) {
  torch::stable::Tensor flat = v;
  if (v.dim() != 2) {
    flat = torch::stable::reshape(v, {v.size(-1) ? v.numel() / v.size(-1) : 0, v.size(-1)});
  }
  const bool adjacent = flat.size(1) <= 1 || flat.stride(1) == 1;
  return adjacent ? flat : torch::stable::contiguous(flat);
}

}  // namespace lora_kernels

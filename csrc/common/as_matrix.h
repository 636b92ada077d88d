// A tensor as rows, as both compiled parts read it.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace lora_kernels {

// The same memory with other sizes and strides, from a number on; cheaper than a view through the dispatcher.
inline torch::stable::Tensor reinterpreted(
    const torch::stable::Tensor& t, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
    int64_t offset = 0) {
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      t.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), offset, &view));
  return torch::stable::Tensor(view);
}

// v [..., C] as [M, C]; a copy only where rows are not evenly spaced or their numbers not adjacent.
inline torch::stable::Tensor as_matrix(const torch::stable::Tensor& v) {
  torch::stable::Tensor flat = v;
  if (v.dim() != 2) {
    const int64_t columns = v.size(-1), rows = columns ? v.numel() / columns : 0;
    flat = v.is_contiguous() ? reinterpreted(v, {rows, columns}, {columns, 1}) : torch::stable::reshape(v, {rows, columns});
  }
  const bool adjacent = flat.size(1) <= 1 || flat.stride(1) == 1;
  return adjacent ? flat : torch::stable::contiguous(flat);
}

}  // namespace lora_kernels

// Where a call's launches are made: on a GPU's stream, or by whoever runs kernels in a GPU's stead.

#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "../../common/call.h"
#include "plan.h"

namespace lora_kernels {

class Target {
 public:
  virtual ~Target() = default;
  // What is planned for.
  virtual Device device() = 0;
  // Memory of a shape and an element type, `like`'s own without one.
  virtual Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType> type = {}) = 0;
  // At least so many int32 zeros, which every launch leaves as it found them.
  virtual Tensor zeros(const Tensor& like, int count) = 0;
  // Told of what launches read, but for what was made here.
  virtual void reads(const Tensor& t) = 0;
  // Encodes where boxes are copied from.
  virtual TensorMap map(const Boxes& boxes) = 0;
  // The seam: every launch of the compiled kernels passes here. `params` are copied.
  virtual void launch(const Launch& how, const void* params, size_t bytes) = 0;
};

// The GPU of a tensor, or the executor of this context for one that is no GPU's.
std::unique_ptr<Target> target_of(const Tensor& t);

}  // namespace lora_kernels

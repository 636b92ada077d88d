// W in four bits on a target: what kernels take of it, and W itself, decoded to memory.

#pragma once

#include "../../common/weight.h"
#include "target.h"

namespace lora_kernels {

// Codes, scales and numbers as rows of bytes without gaps, and what points into them.
struct CodedWeight {
  std::vector<Tensor> tensors;
  Codes codes;
  Store store;
};

CodedWeight coded(const Weight& weight, Target& target);

// W [n, k] in v's type, in new memory, by one launch.
Tensor decoded(const CodedWeight& weight, int64_t n, int64_t k, const Tensor& v, Type type, Target& target);

}  // namespace lora_kernels

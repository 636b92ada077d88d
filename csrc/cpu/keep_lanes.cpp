// The mask for impl/eager on CPUs, as int16 lanes: lora_kernels::keep_lanes_ (schema in registration.py).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace {

constexpr int64_t kLanes = 8;     // 16-bit lanes of one Philox call
constexpr int64_t kBlock = 512;   // counters at a time: their bits stay in L1
constexpr int64_t kGrain = 4096;  // counters a thread takes at least

void keep_lanes_(torch::stable::Tensor lanes, int64_t start, int64_t seed, int64_t threshold) {
  STD_TORCH_CHECK(
      lanes.dim() == 2 && lanes.size(1) == kLanes && lanes.is_contiguous(),
      "lanes: expected a contiguous int16 tensor [count, 8]");
  STD_TORCH_CHECK(
      lanes.scalar_type() == torch::headeronly::ScalarType::Short, "lanes: expected int16");
  auto* out = static_cast<int16_t*>(lanes.mutable_data_ptr());
  torch::stable::parallel_for(0, lanes.size(0), kGrain, [=](int64_t begin, int64_t end) {
    uint8_t bits[kBlock];
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      lora_kernels::kernels().keep_bits(
          static_cast<uint64_t>(start + first), count, static_cast<uint64_t>(seed),
          static_cast<uint32_t>(threshold), bits);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < kLanes; ++j) {
          out[(first + i) * kLanes + j] = static_cast<int16_t>(bits[i] >> j & 1);
        }
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("keep_lanes_", TORCH_BOX(&keep_lanes_));
}

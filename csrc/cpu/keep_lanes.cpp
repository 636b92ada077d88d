// The dropout mask for the CPU, one Philox-4x32-10 call for eight lanes: lora_kernels::keep_lanes_.
//
// Schema and documentation stand in lora_kernels/ops.py; this file has the body alone. The inner
// loop is plain C++ that the compiler vectorises; on x86-64 Linux it is compiled once for each
// instruction set and the loader picks one, so that one binary runs on any such processor.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#define LORA_EACH_ISA __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LORA_EACH_ISA
#endif

namespace {

constexpr int64_t kLanes = 8;    // 16-bit lanes of one Philox call
constexpr int64_t kBlock = 32;   // counters in flight, a multiple of every vector's width
constexpr int64_t kGrain = 4096; // counters a thread takes at least: about 25 us of work

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kKeyStep0 = 0x9E3779B9, kKeyStep1 = 0xBB67AE85;

// Writes kBlock * 4 words, each two int16 lanes of 1 (keep) or 0 (drop), for counters from start.
LORA_EACH_ISA void fill_block(uint32_t* out, uint64_t start, uint64_t seed, uint32_t threshold) {
  uint32_t c0[kBlock], c1[kBlock], c2[kBlock] = {}, c3[kBlock] = {};
  for (int64_t i = 0; i < kBlock; ++i) {
    c0[i] = static_cast<uint32_t>(start + i);
    c1[i] = static_cast<uint32_t>((start + i) >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int64_t i = 0; i < kBlock; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(c0[i]) * kMultiplier0;
      const uint64_t p1 = static_cast<uint64_t>(c2[i]) * kMultiplier1;
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += kKeyStep0;
    k1 += kKeyStep1;
  }
  const auto keep = [threshold](uint32_t word) -> uint32_t {
    return uint32_t{(word & 0xFFFF) >= threshold} | uint32_t{(word >> 16) >= threshold} << 16;
  };
  for (int64_t i = 0; i < kBlock; ++i) {
    out[4 * i] = keep(c0[i]);
    out[4 * i + 1] = keep(c1[i]);
    out[4 * i + 2] = keep(c2[i]);
    out[4 * i + 3] = keep(c3[i]);
  }
}

void keep_lanes_(torch::stable::Tensor lanes, int64_t start, int64_t seed, int64_t threshold) {
  STD_TORCH_CHECK(
      lanes.dim() == 2 && lanes.size(1) == kLanes && lanes.is_contiguous(),
      "lanes: expected a contiguous int16 tensor [count, 8]");
  STD_TORCH_CHECK(
      lanes.scalar_type() == torch::headeronly::ScalarType::Short, "lanes: expected int16");
  auto* out = static_cast<char*>(lanes.mutable_data_ptr());
  torch::stable::parallel_for(0, lanes.size(0), kGrain, [=](int64_t begin, int64_t end) {
    constexpr int64_t kBytes = kLanes * sizeof(int16_t);
    uint32_t block[kBlock * 4];
    for (int64_t first = begin; first < end; first += kBlock) {
      fill_block(
          block,
          static_cast<uint64_t>(start + first),
          static_cast<uint64_t>(seed),
          static_cast<uint32_t>(threshold));
      std::memcpy(out + first * kBytes, block, std::min(kBlock, end - first) * kBytes);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("keep_lanes_", TORCH_BOX(&keep_lanes_));
}

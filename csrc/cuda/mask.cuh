// The dropout mask of reference.keep_mask: one Philox-4x32-10 call for eight columns of a row.

#pragma once

#include <cstdint>

#include "params.h"
#include "ptx.cuh"

namespace lora_kernels {

// One instruction for both words; the compiler takes a 64-bit product apart by shifts.
__device__ inline void multiply_wide(uint32_t& low, uint32_t& high, uint32_t a, uint32_t b) {
  asm("{ .reg .b64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p; }" : "=r"(low), "=r"(high) : "r"(a), "r"(b));
}
__device__ inline uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

// What a thread needs to draw bits of an activation [*, k].
struct Mask {
  const Layer& layer;  // a kernel's parameter: what is read from it takes no register
  uint32_t key_low, key_high;

  __device__ explicit Mask(const Layer& layer) : layer(layer), key_low(0), key_high(0) {
    const uint64_t seed = layer.seed ? static_cast<uint64_t>(*layer.seed) : 0;
    key_low = static_cast<uint32_t>(seed);
    key_high = static_cast<uint32_t>(seed >> 32);
  }

  // The four words of a row's group of columns; lane j of eight is half j % 2 of word j / 2.
  __device__ uint4 words(int row, int group) const {
    const uint64_t groups = static_cast<uint32_t>(layer.k + 7) / 8;
    const uint64_t counter = static_cast<uint32_t>(row) * groups + static_cast<uint32_t>(group);
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = key_low, k1 = key_high;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      uint32_t low0, high0, low1, high1;
      multiply_wide(low0, high0, c0, 0xD2511F53u);
      multiply_wide(low1, high1, c2, 0xCD9E8D57u);
      c0 = xor3(high1, c1, k0);
      c1 = low1;
      c2 = xor3(high0, c3, k1);
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
  }

  __device__ bool keeps_low(uint32_t word) const { return (word << 16) >= layer.threshold << 16; }
  __device__ bool keeps_high(uint32_t word) const { return word >= layer.threshold << 16; }

  // Bit j of eight: whether lane j of a call's words stays.
  __device__ uint32_t bits(uint4 of) const {
    const uint32_t words[4] = {of.x, of.y, of.z, of.w};
    uint32_t result = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) result |= keeps_low(words[i]) << 2 * i | keeps_high(words[i]) << (2 * i + 1);
    return result;
  }

  // Two neighbouring 16-bit elements, those zeroed that their halves of the word drop.
  __device__ uint32_t kept(uint32_t pair, uint32_t word) const {
    return pair & ((keeps_low(word) ? 0x0000FFFFu : 0u) | (keeps_high(word) ? 0xFFFF0000u : 0u));
  }

  // A left operand's fragment, of the words that its elements have.
  __device__ void keep(uint32_t (&fragment)[4], uint4 of) const {
    fragment[0] = kept(fragment[0], of.x);
    fragment[1] = kept(fragment[1], of.y);
    fragment[2] = kept(fragment[2], of.z);
    fragment[3] = kept(fragment[3], of.w);
  }

  // Words for the elements of a quad's four threads in two 8 x 8 blocks of a 16-row tile: thread t holds
  // columns 2t, 2t + 1 of rows `row` and `row` + 8 in group `group` and in the next. Each thread draws one
  // of the four calls; the words are then exchanged. Returns those of (row, group), (row + 8, group),
  // (row, group + 1), (row + 8, group + 1).
  __device__ uint4 quad_words(int row, int group, int t) const {
    const uint4 mine = words(row + 8 * (t & 1), group + (t >> 1));
    const bool odd = t & 1, upper = t & 2;
    // Between neighbours: even threads take even words of both calls, odd threads odd ones.
    const uint32_t from0 = __shfl_xor_sync(0xFFFFFFFFu, odd ? mine.x : mine.y, 1);
    const uint32_t from1 = __shfl_xor_sync(0xFFFFFFFFu, odd ? mine.z : mine.w, 1);
    const uint32_t own0 = odd ? mine.y : mine.x, own1 = odd ? mine.w : mine.z;
    const uint32_t first0 = odd ? from0 : own0, second0 = odd ? own0 : from0;  // of words 0 or 1
    const uint32_t first1 = odd ? from1 : own1, second1 = odd ? own1 : from1;  // of words 2 or 3
    // Between halves of the quad: the lower one takes words 0 and 1 of all calls, the upper one 2 and 3.
    const uint32_t from2 = __shfl_xor_sync(0xFFFFFFFFu, upper ? first0 : first1, 2);
    const uint32_t from3 = __shfl_xor_sync(0xFFFFFFFFu, upper ? second0 : second1, 2);
    // One by one: a choice of the whole would be a branch that divides the warp.
    return make_uint4(upper ? from2 : first0, upper ? from3 : second0, upper ? first1 : from2, upper ? second1 : from3);
  }

  // Eight bits for each of (row, group), (row + 8, group), (row, group + 1), (row + 8, group + 1): for the four
  // threads of a quad, which draw one call each.
  __device__ uint32_t quad_bits(int row, int group, int t) const {
    uint32_t all = bits(words(row + 8 * (t & 1), group + (t >> 1))) << 8 * t;
    all |= __shfl_xor_sync(0xFFFFFFFFu, all, 1);
    return all | __shfl_xor_sync(0xFFFFFFFFu, all, 2);
  }
};

// Drops elements of left operands' fragments, taken in order of depth.
template <class T>
struct LeftMask {
  // A fragment whose first element of this thread's quad is (row, column).
  template <int kSlice>
  __device__ void keep(uint32_t (&fragment)[4], const Mask& mask, int row, int column, int t) {
    mask.keep(fragment, mask.quad_words(row, column / 8, t));
  }
};
template <>
struct LeftMask<float> {
  uint32_t bits;  // of four fragments

  template <int kSlice>
  __device__ void keep(float4 (&fragment)[2], const Mask& mask, int row, int column, int t) {
    if (kSlice % 4 == 0) bits = mask.quad_bits(row, column / 8, t);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t mine = bits >> (8 * (half + kSlice / 2 % 2 * 2) + kSlice % 2 * 4);
      fragment[half].x = mine & 1 ? fragment[half].x : 0;
      fragment[half].y = mine & 2 ? fragment[half].y : 0;
      fragment[half].z = mine & 4 ? fragment[half].z : 0;
      fragment[half].w = mine & 8 ? fragment[half].w : 0;
    }
  }
};

template <>
struct LeftMask<Tf32> {
  uint32_t bits;  // of two fragments

  template <int kSlice>
  __device__ void keep(uint32_t (&fragment)[4], const Mask& mask, int row, int column, int t) {
    if (kSlice % 2 == 0) bits = mask.quad_bits(row, column / 8, t);
    const uint32_t mine = bits >> (kSlice % 2 * 16 + t);
    fragment[0] = mine & 1 ? fragment[0] : 0;
    fragment[1] = mine & 1 << 8 ? fragment[1] : 0;
    fragment[2] = mine & 1 << 4 ? fragment[2] : 0;
    fragment[3] = mine & 1 << 12 ? fragment[3] : 0;
  }
};

__device__ inline float keep_scale(const Layer& layer) {
  return 65536.0f / static_cast<float>(65536 - layer.threshold);
}

__device__ inline float scaling_of(const Layer& layer) {
  return layer.scaling_pointer ? *layer.scaling_pointer : layer.scaling;
}

}  // namespace lora_kernels

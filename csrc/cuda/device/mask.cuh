// The dropout mask of reference.keep_mask: one Philox-4x32-10 call for eight columns of a row.

#pragma once

#include <cstdint>

#include "../host/params.h"
#include "ptx.cuh"
#include "../host/shapes.h"

namespace lora_kernels {

// One instruction for both words; the compiler takes a 64-bit product apart by shifts.
__device__ inline void multiply_wide(uint32_t& low, uint32_t& high, uint32_t a, uint32_t b) {
  asm("{ .reg .b64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p; }" : "=r"(low), "=r"(high) : "r"(a), "r"(b));
}
// Any function of three bits, by its table.
template <int kTable>
__device__ inline uint32_t bitwise(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return result;
}
__device__ inline uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) { return bitwise<0x96>(a, b, c); }
__device__ inline uint32_t majority(uint32_t a, uint32_t b, uint32_t c) { return bitwise<0xE8>(a, b, c); }

// The bits of a where kWhich, which takes no register, has ones, else those of b.
template <uint32_t kWhich>
__device__ inline uint32_t choose(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(result) : "r"(a), "r"(b), "n"(kWhich));
  return result;
}
// Bytes of a (0 to 3) and b (4 to 7), as the selector's digits say, the lowest first; with 8 more, their top bits.
template <uint32_t kSelector>
__device__ inline uint32_t permute(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "n"(kSelector));
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
    uint32_t low0, high0, low1, high1;
    multiply_wide(low0, high0, static_cast<uint32_t>(counter), 0xD2511F53u);
    // The counter's upper words are zero: half of the first round.
    uint32_t c0 = static_cast<uint32_t>(counter >> 32) ^ key_low, c1 = 0, c2 = high0 ^ key_high, c3 = low0;
    uint32_t k0 = key_low, k1 = key_high;
#pragma unroll
    for (int round = 1; round < 10; ++round) {
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
      multiply_wide(low0, high0, c0, 0xD2511F53u);
      multiply_wide(low1, high1, c2, 0xCD9E8D57u);
      c0 = xor3(high1, c1, k0);
      c1 = low1;
      c2 = xor3(high0, c3, k1);
      c3 = low0;
    }
    return make_uint4(c0, c1, c2, c3);
  }

  __device__ bool keeps_low(uint32_t word) const { return (word << 16) >= layer.threshold << 16; }
  __device__ bool keeps_high(uint32_t word) const { return word >= layer.threshold << 16; }

  // Ones in each half of a word that is at least the threshold, zeros elsewhere; both halves at once. With its top bit
  // set a half borrows nothing from its neighbour, and the difference's top bit compares the other 15. Where the
  // threshold's own top bit is set it takes that and the half's (their majority with 0), else either (with 1).
  __device__ uint32_t halves(uint32_t word) const {
    const uint32_t least = majority((word | 0x80008000u) - layer.lower_bits, word, layer.either);
    return permute<0xBB99>(least, least);
  }
  __device__ uint4 halves(uint4 words) const {
    return make_uint4(halves(words.x), halves(words.y), halves(words.z), halves(words.w));
  }

  // A group's mask as a byte, of its words' halves: even lanes from bit 0 on, odd ones from bit 4.
  __device__ static uint32_t bits(uint4 halves) {
    const uint32_t first = choose<0x55555555>(halves.x, halves.y), second = choose<0x55555555>(halves.z, halves.w);
    const uint32_t all = choose<0x33333333>(first, second);
    return choose<0x0000000F>(all, all >> 16);
  }

  // The bits of 16 rows' fragments in kWordColumns columns, for the four threads that hold rows `row` and `row` + 8:
  // a pair of columns each of every group. Lanes of the first group are each byte's top bits: even ones of `row` and
  // of `row` + 8, then odd ones.
  __device__ uint4 fragment_words(int row, int group) const {
    uint4 all = make_uint4(0, 0, 0, 0);
#pragma unroll 2
    for (int i = 0; i < kWordColumns / 8; ++i) {
      const uint4 upper = halves(words(row, group + i)), lower = halves(words(row + 8, group + i));
      all.x = choose<0x00010001>(upper.x, choose<0x01000100>(lower.x, all.x << 1));
      all.y = choose<0x00010001>(upper.y, choose<0x01000100>(lower.y, all.y << 1));
      all.z = choose<0x00010001>(upper.z, choose<0x01000100>(lower.z, all.z << 1));
      all.w = choose<0x00010001>(upper.w, choose<0x01000100>(lower.w, all.w << 1));
    }
    return all;
  }

  // A left operand's fragment, of the words that its elements have.
  __device__ void keep(uint32_t (&fragment)[4], uint4 of) const {
    const uint4 kept = halves(of);
    fragment[0] &= kept.x;
    fragment[1] &= kept.y;
    fragment[2] &= kept.z;
    fragment[3] &= kept.w;
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

  // A byte for each of (row, group), (row + 8, group), (row, group + 1), (row + 8, group + 1): for the four threads of
  // a quad, which draw one call each.
  __device__ uint32_t quad_bits(int row, int group, int t) const {
    uint32_t all = (bits(halves(words(row + 8 * (t & 1), group + (t >> 1)))) & 0xFF) << 8 * t;
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
      const uint32_t mine = bits >> (8 * (half + kSlice / 2 % 2 * 2) + kSlice % 2 * 2);
      fragment[half].x = mine & 1 ? fragment[half].x : 0;
      fragment[half].y = mine & 1 << 4 ? fragment[half].y : 0;
      fragment[half].z = mine & 2 ? fragment[half].z : 0;
      fragment[half].w = mine & 2 << 4 ? fragment[half].w : 0;
    }
  }
};

template <>
struct LeftMask<Tf32> {
  uint32_t bits;  // of two fragments

  template <int kSlice>
  __device__ void keep(uint32_t (&fragment)[4], const Mask& mask, int row, int column, int t) {
    if (kSlice % 2 == 0) bits = mask.quad_bits(row, column / 8, t);
    const uint32_t mine = bits >> (kSlice % 2 * 16 + t / 2 + t % 2 * 4);  // lane t; t + 4 is two bits on
    fragment[0] = mine & 1 ? fragment[0] : 0;
    fragment[1] = mine & 1 << 8 ? fragment[1] : 0;
    fragment[2] = mine & 1 << 2 ? fragment[2] : 0;
    fragment[3] = mine & 1 << 10 ? fragment[3] : 0;
  }
};

// Where the words of 16 rows and kWordColumns columns lie.
__device__ inline uint32_t* words_of(const PackedMask& mask, const Layer& layer, int row, int column) {
  const int64_t blocks = static_cast<uint32_t>(layer.k + kDrawnColumns - 1) / kDrawnColumns * (kDrawnColumns / kWordColumns);
  return mask.words + 32 * (row / 16 * blocks + column / kWordColumns);
}

// Drops elements of a left operand's fragment, the kSlice-th of those that the word is for.
template <int kSlice>
__device__ inline void keep_by_word(uint32_t (&fragment)[4], uint32_t word) {
  const uint32_t first = word << 2 * kSlice, second = word << (2 * kSlice + 1);
  fragment[0] &= permute<0xAA88>(first, first);
  fragment[1] &= permute<0xBB99>(first, first);
  fragment[2] &= permute<0xAA88>(second, second);
  fragment[3] &= permute<0xBB99>(second, second);
}

// The words of a warp's 16 rows, step by step of a tile's product.
template <int kDepth>
struct DrawnLeft {
  const uint32_t* next;
  uint32_t word, ahead;

  // row: the first of the warp's 16.
  __device__ DrawnLeft(const PackedMask& mask, const Layer& layer, int row)
      : next(words_of(mask, layer, row, 0) + threadIdx.x % 32), word(0), ahead(load_fresh_word(next)) {}

  // Takes a step's words and fetches those after them, if there are any.
  __device__ void advance(int step, int steps) {
    constexpr int kSteps = kWordColumns / kDepth;
    if (step % kSteps == 0) {
      word = ahead;
      // The last words stand for those that are not there.
      next += step + kSteps < steps ? 32 : 0;
      ahead = load_fresh_word(next);
    } else {
      word <<= kDepth / 8;
    }
  }

  template <int kSlice>
  __device__ void keep(uint32_t (&fragment)[4]) const {
    keep_by_word<kSlice>(fragment, word);
  }
};

struct NothingDrawn {
  __device__ NothingDrawn(const PackedMask&, const Layer&, int) {}
  __device__ void advance(int, int) {}
};

// The byte of a row's group of columns.
constexpr int kMaskRowBytes = kSumColumns / 8;
__device__ inline uint8_t* byte_of(const DrawnMask& mask, int row, int column) {
  const int64_t whole_rows = static_cast<int64_t>(column / kSumColumns) * mask.rows + row;
  return mask.bits + whole_rows * kMaskRowBytes + column % kSumColumns / 8;
}

__device__ inline float keep_scale(const Layer& layer) {
  return 65536.0f / static_cast<float>(65536 - layer.threshold);
}

__device__ inline float scaling_of(const Layer& layer) {
  return layer.scaling_pointer ? *layer.scaling_pointer : layer.scaling;
}

}  // namespace lora_kernels

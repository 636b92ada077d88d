// dxa of float16 lies in units, powers of two, of each slice of ranks of a row panel one: its own range is short, and what
// is small there may be all that dA has. Of other types the unit is 1, and nothing is computed for it.

#pragma once

#include <type_traits>

#include "mainloop.cuh"

namespace lora_kernels {

// The units of dxa as its makers left them.
template <class S, int kRanks>
struct Units {
  const float* units;
  int slices;
  __device__ float at(int row, int rank) const { return load_fresh(units + row / S::kRows * slices + rank / kRanks, true); }
};
struct NoUnits {
  __device__ float at(int, int) const { return 1.0f; }
};

__device__ inline float inverse_of(float unit) { return __uint_as_float(0x7F000000u - __float_as_uint(unit)); }

// A power of two such that float16 holds a tile's shrink sums, times scale, in it, each to its precision. The largest finite
// one is below 2^15 then. Up from there units are as small as that allows, down from there they are 1, 2^-16, 2^-32 and so
// on: near rows have the same. The least is 2^-64, beyond float16's products. shared: a number for each warp.
template <class S, int kRanks>
__device__ inline float unit_of(const ShrinkSums<kRanks>& shrink, float scale, uint32_t shared) {
  float largest = 0x1p-50f;
#pragma unroll
  for (int j = 0; j < kRanks / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float size = fabsf(shrink.v[j][e] * scale);
      largest = size < INFINITY ? fmaxf(largest, size) : largest;
    }
  }
#pragma unroll
  for (int apart = 16; apart; apart /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, apart));
  // Equal numbers of a warp's threads at one place.
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared + threadIdx.x / 32 * 4), "f"(largest) : "memory");
  synchronize<S>();
#pragma unroll
  for (int warp = 0; warp < S::kThreads / 32; ++warp) {
    float other;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(other) : "r"(shared + warp * 4) : "memory");
    largest = fmaxf(largest, other);
  }
  synchronize<S>();
  const uint32_t exponent = __float_as_uint(largest) >> 23;
  return __uint_as_float((exponent - (exponent < 127 + 15 ? (exponent + 2) % 16 - 1 : 14)) << 23);
}

// Sums of products of dxa, always in the unit of the rows at hand.
template <class TheUnits>
struct RunningUnit {
  static constexpr bool kInUnits = !std::is_same_v<TheUnits, NoUnits>;
  const TheUnits& units;
  int rank;
  float now, ahead;

  __device__ RunningUnit(const TheUnits& units, int row, int rank) : units(units), rank(rank) {
    if constexpr (kInUnits) now = ahead = units.at(row, rank);
  }
  // Goes on to the next rows, after which come those from `next` on: their unit is read a step ahead.
  template <class Sums>
  __device__ void advance(Sums& sums, int next) {
    if constexpr (kInUnits) {
      const float before = now;
      now = ahead;
      ahead = units.at(next, rank);
      if (now != before) sums.multiply(before * inverse_of(now));
    }
  }
  template <class Sums>
  __device__ void finish(Sums& sums) const {
    if constexpr (kInUnits) sums.multiply(now);
  }
};

}  // namespace lora_kernels

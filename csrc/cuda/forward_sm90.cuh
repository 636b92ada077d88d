// The forward of forward.cuh for sm_90a: one warpgroup copies, two multiply, and neither waits for the other but
// through barriers. Copying runs on into the next tile while the last one is finished and stored.

#pragma once

#include "epilogue.cuh"
#include "hopper.cuh"

namespace lora_kernels {

// What lies where in shared memory; tiles of x and W at multiples of 1,024 bytes, as their permutation asks.
template <class T, class S, int kRanks>
struct HopperMemory {
  using Left = Tile<T, S::kRows, S::kDepth>;
  using Right = Tile<T, S::kColumns, S::kDepth>;
  using Thin = Tile<T, kRanks, S::kDepth>;
  using Xa = Tile<T, S::kRows, kRanks>;
  using B = Tile<T, S::kColumns, kRanks>;
  static constexpr int kStageBytes = Left::kBytes + Right::kBytes;
  static constexpr int kThin = S::kStages * kStageBytes, kXa = kThin + S::kStages * Thin::kBytes, kB = kXa + Xa::kBytes;
  static constexpr int kOut = kB + B::kBytes, kBarriers = kOut + 2 * S::kRows * S::kColumns;
  static_assert(kBarriers + 8 * (2 * S::kStages + 2) <= hopper_bytes(kRanks), "what the host asks for");

  uint32_t first;
  __device__ uint32_t left(int stage) const { return first + stage * kStageBytes; }
  __device__ uint32_t right(int stage) const { return left(stage) + Left::kBytes; }
  __device__ uint32_t thin(int stage) const { return first + kThin + stage * Thin::kBytes; }
  __device__ uint32_t filled(int stage) const { return first + kBarriers + 8 * stage; }
  __device__ uint32_t read(int stage) const { return filled(S::kStages + stage); }
  __device__ uint32_t factors_filled() const { return filled(2 * S::kStages); }
  __device__ uint32_t factors_read() const { return filled(2 * S::kStages + 1); }

  __device__ void init() const {
    for (int stage = 0; stage < S::kStages; ++stage) {
      init_barrier(filled(stage), kHopperCopying + 1);
      init_barrier(read(stage), S::kThreads / 32);
    }
    init_barrier(factors_filled(), kHopperCopying);
    init_barrier(factors_read(), S::kThreads / 32);
    fence_barriers();
  }
};

// The tiles of a program, in the same order for all of its warps.
struct HopperTile {
  int row, column, panel;
  bool producing;

  template <class S>
  static __device__ HopperTile at(const ForwardParams& p, int tile) {
    const bool producing = tile < p.grid.panels * p.producers;
    Position at{tile, 0};
    if (!producing) {
      at = grouped_tile(tile - p.grid.panels * p.producers, p.grid.panels, p.grid.columns - p.producers);
      at.column += p.producers;
    }
    return {at.row * S::kRows, at.column * S::kColumns, at.row, producing};
  }
};

template <class T, class S, int kRanks>
__device__ inline void copy_operands(const HopperForwardParams& params, const HopperMemory<T, S, kRanks>& memory) {
  using M = HopperMemory<T, S, kRanks>;
  const ForwardParams& p = params.forward;
  const Layer& layer = p.layer;
  const bool one = threadIdx.x == S::kThreads;
  const int steps = (layer.k + S::kDepth - 1) / S::kDepth;
  const Source a = adapter<T>(layer, layer.a, layer.r, layer.k), b = adapter<T>(layer, layer.b, layer.n, layer.r);
  const Source xa = matrix<T>({p.xa, layer.r}, layer.m, layer.r);
  int stage = 0, parity = 1, done = 0;
  for (int index = blockIdx.x; index < p.grid.panels * p.grid.columns; index += gridDim.x, ++done) {
    const HopperTile tile = HopperTile::at<S>(p, index);
    for (int step = 0; step < steps; ++step) {
      wait_for_phase(memory.read(stage), parity);
      const uint32_t filled = memory.filled(stage);
      arrive_expecting(filled, M::kStageBytes, one);
      copy_box(memory.left(stage), params.x_map.bytes, tile.row, step * S::kDepth, filled, one);
      copy_box(memory.right(stage), params.w_map.bytes, tile.column, step * S::kDepth, filled, one);
      if (tile.producing) {
        copy_tile<T, typename M::Thin, kHopperCopying, S::kThreads>(memory.thin(stage), a, 0, step * S::kDepth);
        arrive_after_copies(filled);
      } else {
        arrive(filled);
      }
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
      parity ^= stage == 0;
    }
    // The low-rank factors are the last step: only here does anybody wait for another program.
    wait_for_phase(memory.factors_read(), ~done & 1);
    // All lanes of a warp ask, so that none waits at the barrier for another.
    if (threadIdx.x / 32 == S::kThreads / 32) {
      while (!__all_sync(0xFFFFFFFFu, acquire_load(p.flags + tile.panel) >= p.producers)) __nanosleep(32);
    }
    synchronize<2, kHopperCopying>();
    copy_tile<T, typename M::Xa, kHopperCopying, S::kThreads>(memory.first + M::kXa, xa, tile.row, 0);
    copy_tile<T, typename M::B, kHopperCopying, S::kThreads>(memory.first + M::kB, b, tile.column, 0);
    commit_copies();
    wait_for_copies<0>();
    arrive(memory.factors_filled());
    synchronize<2, kHopperCopying>();
    count_out(p.flags + tile.panel, p.producers + p.grid.columns - 1, one);
  }
}

// xa of a warp's 16 rows from one step's x and A.
template <class T, class S, int kRanks, bool kDropout>
__device__ inline void add_thin(ThinSums<kRanks>& sums, const HopperMemory<T, S, kRanks>& memory, const Place<S>& place,
                                const Mask& mask, int row, int stage, int column) {
  using M = HopperMemory<T, S, kRanks>;
  const LeftReader<typename M::Left> left(place.thin_row);
  const RightReader<typename M::Thin, false> thin(0);
  LeftMask<T> left_mask;
  repeat<S::kDepth / kDeep<T>>([&](auto slice) {
    Left<T> kept;
    left.template read<0>(kept, memory.left(stage), slice);
    if (kDropout) {
      left_mask.template keep<slice>(kept, mask, row + place.thin_row + place.group, column + 16 * slice, place.t);
    }
    repeat<kRanks / 16>([&](auto j) {
      Right<T> f;
      thin.template read<16 * j, slice>(f, memory.thin(stage));
      multiply<T>(sums.v[2 * j], kept, f[0], f[1]);
      multiply<T>(sums.v[2 * j + 1], kept, f[2], f[3]);
    });
  });
}

template <class T, class S, int kRanks, bool kDropout>
__device__ inline void multiply_operands(const ForwardParams& p, const HopperMemory<T, S, kRanks>& memory) {
  using M = HopperMemory<T, S, kRanks>;
  const Layer& layer = p.layer;
  const Place<S> place;
  const Mask mask(layer);
  const bool one_of_warp = threadIdx.x % 32 == 0;
  const int steps = (layer.k + S::kDepth - 1) / S::kDepth, group_row = threadIdx.x / 128 * 64;
  int stage = 0, parity = 0, done = 0;
  for (int index = blockIdx.x; index < p.grid.panels * p.grid.columns; index += gridDim.x, ++done) {
    const HopperTile tile = HopperTile::at<S>(p, index);
    Sums<S> sums;
    ThinSums<kRanks> thin;
    sums.clear();
    int before = 0;
    for (int step = 0; step < steps; ++step) {
      wait_for_phase(memory.filled(stage), parity);
      const uint64_t left = operand(memory.left(stage) + group_row * M::Left::kRowBytes), right = operand(memory.right(stage));
      begin_products();
      // 16 elements are 32 bytes, two of the 16 that addresses count.
      repeat<S::kDepth / 16>([&](auto slice) { multiply_async<T>(sums.v[0], left + 2 * slice, right + 2 * slice); });
      commit_products();
      if (tile.producing) {
        add_thin<T, S, kRanks, kDropout>(thin, memory, place, mask, tile.row, stage, step * S::kDepth);
      }
      wait_for_products<1>();
      arrive(memory.read(before), step && one_of_warp);
      before = stage;
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
      parity ^= stage == 0;
    }
    wait_for_products<0>();
    arrive(memory.read(before), one_of_warp);
    if (tile.producing) {
      store_thin<T>(thin, keep_scale(layer), p.xa, tile.row + place.thin_row, layer.m, 0, layer.r);
      synchronize<S>();
      release_add(p.flags + tile.panel, threadIdx.x == 0);
    }
    wait_for_phase(memory.factors_filled(), done & 1);
    const Operands at{layer, {}, {}, {}, tile.row, tile.column, layer.r};
    add_ranks<T, S, kRanks, false, false>(sums, place, mask, at, scaling_of(layer), layer.r, memory.first + M::kXa,
                                          memory.first + M::kB);
    __syncwarp();
    arrive(memory.factors_read(), one_of_warp);
    if (p.bias) add_bias<T, S>(sums, place, static_cast<const Bits<T>*>(p.bias), tile.column, layer.n);
    store_sums<T, S>(sums, place, p.y, tile.row, tile.column, layer.m, layer.n, memory.first + M::kOut);
  }
}

template <class T, int kRanks, bool kDropout>
__device__ inline void forward_sm90(const HopperForwardParams& params) {
  using S = Hopper;
  extern __shared__ __align__(1024) char dynamic[];
  const HopperMemory<T, S, kRanks> memory{shared_address(dynamic)};
  if (threadIdx.x == 0) memory.init();
  __syncthreads();
  if (threadIdx.x >= S::kThreads) {
    give_registers<40>();
    copy_operands<T, S, kRanks>(params, memory);
  } else {
    take_registers<232>();
    multiply_operands<T, S, kRanks, kDropout>(params.forward, memory);
  }
}

}  // namespace lora_kernels

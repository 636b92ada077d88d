// The forward of forward.cuh for sm_90a: the same tiles, numbers and flags, by two sides of a program; see pipeline.cuh.
//
// For one tile the side that copies takes the number, starts the copies of x and W step by step into a ring, with A's where
// the tile makes xa, waits until xa of the row panel is there, and copies xa and B. The side that multiplies follows: x WT by
// wgmma; D(x) AT of the same buffers where the tile makes xa, which it stores and publishes; then xa BT, bias and the store of
// y, while the other side copies the next tile. Shares of D are drawn by the side that multiplies.

#pragma once

#include "../forward.cuh"
#include "pipeline.cuh"

namespace lora_kernels {

template <class T, class S, int kRanks>
__device__ inline void copy_forward(const HopperForwardParams& params, const HopperMemory<T, S, kRanks, false>& memory) {
  using Memory = HopperMemory<T, S, kRanks, false>;
  const ForwardParams& p = params.forward;
  const Layer& layer = p.layer;
  const Source a = adapter<T>(layer, layer.a, layer.r, layer.k), b = adapter<T>(layer, layer.b, layer.n, layer.r);
  const Source xa = matrix<T>({p.xa, layer.r}, layer.m, layer.r);
  const int draws = p.grid.panels * p.mask.draws;
  CopyingSide<T, S, kRanks, false> side(memory, p.ticket);
  int number = side.next();
  for (; number < draws; number = side.next()) {
    side.take();
    side.pass();
  }
  for (; number < p.ticket.count; number = side.next()) {
    const LargeTile tile = large_tile<S, kRanks>(p.grid, p.shrink, number - draws, 0);
    // For the threads that multiply, which see what this one has seen as soon as the first step is there.
    if (tile.shrinks && p.mask.draws) side.wait(p.flags + tile.panel, p.mask.draws);
    for (int depth = 0; depth < layer.k; depth += S::kDepth) {
      side.begin(Memory::kBoxes);
      side.left(params.x_map, tile.row, depth);
      side.weight(params.w_map, tile.column, depth);
      side.end(tile.shrinks, a, tile.rank, depth);
    }
    const int arrivals = p.mask.draws + p.shrink.slices;
    side.factors(p.flags + tile.panel, arrivals, arrivals + p.grid.columns - 1, xa, tile.row, b, tile.column, layer.r);
  }
  side.pass();
}

template <class T, class S, int kRanks, bool kDropout>
__device__ inline void multiply_forward(const HopperForwardParams& params, const HopperMemory<T, S, kRanks, false>& memory) {
  const ForwardParams& p = params.forward;
  const Layer& layer = p.layer;
  const int draws = p.grid.panels * p.mask.draws;
  const int steps = (layer.k + S::kDepth - 1) / S::kDepth;
  MultiplyingSide<T, S, kRanks, false> side(memory);
  int number = side.next();
  if constexpr (kDropout) {
    for (; number < draws; number = side.next()) {
      side.pass();
      pack_mask<S>(p.mask, layer, number, p.flags);
    }
  }
  for (; number < p.ticket.count; number = side.next()) {
    const LargeTile tile = large_tile<S, kRanks>(p.grid, p.shrink, number - draws, 0);
    Sums<S> sums;
    ShrinkSums<kRanks> shrink;
    side.template product<kDropout>(sums, shrink, layer, p.mask, tile.row, steps, tile.shrinks);
    if (tile.shrinks) {
      store_shrink<T>(shrink, keep_scale(layer), p.xa, tile.row + side.place.shrink_row, layer.m, tile.rank, layer.r);
      publish<S>(p.flags + tile.panel);
    }
    // Kept: left to itself the compiler computes it anew at each of a tile's stores.
    const int column = kept_in_register(tile.column);
    const Operands at{layer, {}, {}, {}, tile.row, column, layer.r};
    side.add_factors(sums, [] { return NoMask{}; }, at, [scale = scaling_of(layer)](int) { return scale; });
    if (p.bias) add_bias_of<T, S>(sums, static_cast<const Bits<T>*>(p.bias), column, layer.n);
    if (params.stores_boxes) {
      side.store(sums, params.y_map, tile.row, column);
    } else {
      store_sums<T, S>(sums, Place<S>(), p.y, tile.row, column, layer.m, layer.n, memory.out());
    }
  }
  wait_for_boxes();
}

template <class T, class S, int kRanks, bool kDropout>
__device__ inline void forward_sm90(const HopperForwardParams& params) {
  run_sides<HopperMemory<T, S, kRanks, false>, S>([&](const auto& memory) { copy_forward<T, S, kRanks>(params, memory); },
                                                  [&](const auto& memory) {
                                                    multiply_forward<T, S, kRanks, kDropout>(params, memory);
                                                  });
}

}  // namespace lora_kernels

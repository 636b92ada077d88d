// y = x WT + bias + scaling * xa BT and xa = D(x) AT in one launch.
//
// A program takes numbers until there are none. With dropout the first numbers are shares of D, which it draws and leaves as
// bits. The others are tiles of y, those of the first columns, which also make xa, before the rest. What it does for a tile:
//
// 1. A tile that makes xa waits until D of its row panel is drawn.
// 2. It sums x WT over K through a ring of stages in shared memory; a tile that makes xa also sums D(x) AT for a slice of
//    ranks, of the x that it has in registers.
// 3. A tile that makes xa stores its slice and publishes it by the row panel's flag.
// 4. It waits until all slices of its row panel are there.
// 5. It expands: scaling * xa BT is added to the same sums.
// 6. It counts itself out of the flag, adds the bias, rounds once and stores y.
//
// Where the columns or the programs are too few for the slices, tiles of their own, before all others, make xa alone.
// docs/kernels.md draws this, and says why no order of programs can deadlock.

#pragma once

#include "epilogue.cuh"
#include "order.cuh"
#include "../host/params.h"

namespace lora_kernels {

// Draws a share of the mask of x for its shrinking tiles: a warp has 16 rows of a row panel.
template <class S>
__device__ inline void pack_mask(const PackedMask& drawn, const Layer& layer, int draw, int* flags) {
  static_assert(16 * S::kThreads / 32 == S::kRows, "16 rows a warp");
  const Mask mask(layer);
  const int lane = threadIdx.x % 32, end = (layer.k + kDrawnColumns - 1) / kDrawnColumns * kDrawnColumns;
  const int panel = draw / drawn.draws, row = panel * S::kRows + threadIdx.x / 32 * 16;
  const int first = draw % drawn.draws * drawn.share * kDrawnColumns;
  for (int column = first; column < min(first + drawn.share * kDrawnColumns, end); column += kDrawnColumns) {
    const int own = column + lane % 4 * kWordColumns;
    uint32_t* const to = words_of(drawn, layer, row, own) + lane / 4 * 4;
    store_words(to, mask.fragment_words(row + lane / 4, own / 8));
  }
  publish<S>(flags + panel);
}

// Tiles that make xa wait for nothing but their shares of D before they publish. Persistent.
template <class T, class S, int kRanks, bool kDropout, bool kInChunks>
__device__ inline void forward(const ForwardParams& p) {
  extern __shared__ __align__(128) char memory[];
  const uint32_t shared = shared_address(memory);
  const Layer& layer = p.layer;
  const Grid& grid = p.grid;
  const int draws = grid.panels * p.mask.draws, arrivals = p.mask.draws + p.shrink.slices;
  Numbers numbers{p.ticket, shared + forward_bytes<S>(kRanks)};
  numbers.take();
  int number = numbers.next();
  if constexpr (kDropout && sizeof(T) == 2) {
    for (; number < draws; number = numbers.next()) {
      numbers.take();
      pack_mask<S>(p.mask, layer, number, p.flags);
    }
  }
  for (; number < p.ticket.count; number = numbers.next()) {
    const int tile = number - draws;
    const bool alone = tile < p.shrink.alone;
    const auto [row, column, panel, rank, shrinks] =
        alone ? shrink_tile<S, kRanks>(p.shrink, tile) : large_tile<S, kRanks>(grid, p.shrink, tile, 0);
    const Operands operands{
        layer, matrix<T>(p.x, layer.m, layer.k), weight<T>(layer),
        adapter<T>(layer, layer.a, layer.r, layer.k), row, column, layer.k, p.mask, rank};
    Sums<S> sums;
    ShrinkSums<kRanks> shrink;
    if (kDropout && sizeof(T) == 2 && shrinks) wait(p.flags + panel, p.mask.draws);
    products<T, S, kRanks, ProductMode{.by_depth = false, .dropout = kDropout, .in_chunks = kInChunks}>(
        sums, shrink, operands, shrinks, alone, shared);
    if (shrinks) {
      store_shrink<T>(shrink, keep_scale(layer), p.xa, row + Place<S>().shrink_row, layer.m, rank, layer.r);
      publish(p.flags + panel);
    }
    if (!alone) wait(p.flags + panel, arrivals);
    numbers.take();
    if (alone) continue;
    const Place<S> place;
    const Operands low_rank{layer, matrix<T>({p.xa, layer.r}, layer.m, layer.r), adapter<T>(layer, layer.b, layer.n, layer.r), {},
                            row, column, layer.r};
    add_low_rank<T, S, kRanks, false>(sums, place, NoMask{}, low_rank, [scale = scaling_of(layer)](int) { return scale; }, shared);
    leave(p.flags + panel, arrivals + grid.columns - 1);
    if (p.bias) add_bias<T, S>(sums, place, static_cast<const Bits<T>*>(p.bias), column, layer.n);
    store_sums<T, S>(sums, place, p.y, row, column, layer.m, layer.n, shared);
  }
}

}  // namespace lora_kernels

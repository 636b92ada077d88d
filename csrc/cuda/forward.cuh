// y = x WT + bias + scaling * xa BT and xa = D(x) AT in one launch.

#pragma once

#include "epilogue.cuh"
#include "params.h"

namespace lora_kernels {

// Tiles of the first `producers` columns (0 or 1) come first and never wait before they publish: no tile
// waits for one that can't run. Persistent; the grid is resident as a whole.
template <class T, class S, int kRanks, bool kDropout, bool kInChunks>
__device__ inline void forward(const ForwardParams& p) {
  extern __shared__ __align__(128) char memory[];
  const uint32_t shared = shared_address(memory);
  const Layer& layer = p.layer;
  const Grid& grid = p.grid;
  for (int tile = blockIdx.x; tile < grid.panels * grid.columns; tile += gridDim.x) {
    const bool producing = tile < grid.panels * p.producers;
    Position at{tile, 0};
    if (!producing) {
      at = grouped_tile(tile - grid.panels * p.producers, grid.panels, grid.columns - p.producers);
      at.column += p.producers;
    }
    const int row = at.row * S::kRows, column = at.column * S::kColumns;
    const Operands operands{
        layer, matrix<T>(p.x, layer.m, layer.k), matrix<T>(layer.w, layer.n, layer.k), adapter<T>(layer, layer.a, layer.r, layer.k),
        row, column, layer.k};
    Sums<S> sums;
    ThinSums<kRanks> thin;
    if (producing) {
      product<T, S, kRanks, false, true, kDropout, kInChunks>(sums, thin, operands, shared);
      store_thin<T>(thin, keep_scale(layer), p.xa, row + Place<S>().thin_row, layer.m, 0, layer.r);
      publish(p.flags + at.row);
    } else {
      product<T, S, kRanks, false, false, kDropout, kInChunks>(sums, thin, operands, shared);
    }
    if (p.producers) wait(p.flags + at.row, p.producers);
    const Place<S> place;
    const Operands low_rank{layer, matrix<T>({p.xa, layer.r}, layer.m, layer.r), adapter<T>(layer, layer.b, layer.n, layer.r), {},
                            row, column, layer.r};
    add_low_rank<T, S, kRanks, false, false>(sums, place, low_rank, scaling_of(layer), shared);
    if (p.producers) leave(p.flags + at.row, p.producers + grid.columns - 1);
    if (p.bias) add_bias<T, S>(sums, place, static_cast<const Bits<T>*>(p.bias), column, layer.n);
    store_sums<T, S>(sums, place, p.y, row, column, layer.m, layer.n, shared);
  }
}

}  // namespace lora_kernels

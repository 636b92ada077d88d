// dx = dy W + D(dxa A), dA = dxaT D(x), dB = scaling * dyT xa and dbias in one launch, by kinds of tiles;
// dxa = scaling * dy B, with dropout's factor in it, so that it is rounded once.
//
// Tiles of dA and dB are sums over rows taken in order: no atomics on results, the same bits in every run. They
// stand between the tiles of dx that make dxa and the rest: memory-bound work beside compute-bound work.

#pragma once

#include "sums.cuh"

namespace lora_kernels {

// A tile of dx, and of dxa if it is one of the first.
template <class T, class S, int kRanks, bool kDropout, bool kInChunks>
__device__ inline void dx_tile(const BackwardParams& p, int tile, uint32_t shared) {
  const Layer& layer = p.layer;
  const Kinds& kinds = p.kinds;
  const bool producing = tile < kinds.dxa;
  Position at{tile, 0};
  if (!producing) {
    at = grouped_tile(tile - kinds.da, p.grid.panels, p.grid.columns - (p.fused ? 1 : 0));
    at.column += p.fused ? 1 : 0;
  }
  const int row = at.row * S::kRows, column = at.column * S::kColumns;
  const Operands operands{layer, matrix<T>(p.dy, layer.m, layer.n), matrix<T>(layer.w, layer.n, layer.k),
                          adapter<T>(layer, layer.b, layer.n, layer.r), row, column, layer.n};
  const Place<S> place;
  Sums<S> sums;
  if (producing) {
    ThinSums<kRanks> thin;
    const float scale = scaling_of(layer) * keep_scale(layer);
    product<T, S, kRanks, true, true, false, kInChunks>(sums, thin, operands, shared);
    store_thin<T>(thin, scale, p.dxa, row + place.thin_row, layer.m, 0, layer.r);
    publish(p.flags + at.row);
  } else {
    ThinSums<kRanks> none;
    product<T, S, kRanks, true, false, false, kInChunks>(sums, none, operands, shared);
  }
  if (p.fused) wait(p.flags + at.row, 1);
  const Operands low_rank{layer, matrix<T>({const_cast<void*>(p.dxa), layer.r}, layer.m, layer.r),
                          adapter<T>(layer, layer.a, layer.r, layer.k), {}, row, column, layer.r};
  add_low_rank<T, S, kRanks, true, kDropout>(sums, place, low_rank, 1.0f, shared);
  if (p.fused) leave(p.flags + at.row, p.grid.columns + (p.da ? kinds.da_blocks : 0));
  store_sums<T, S>(sums, place, p.dx, row, column, layer.m, layer.k, shared);
}

// A tile of dB and dbias, or of dA.
template <class T, class S, int kRanks, bool kDropout, bool kInChunks>
__device__ inline void sum_tile(const BackwardParams& p, int index, bool of_da, uint32_t shared) {
  using C = SumShape<S, kRanks>;
  const Layer& layer = p.layer;
  const Kinds& kinds = p.kinds;
  const int blocks = of_da ? kinds.da_blocks : kinds.db_blocks, block = index % blocks, part = index / blocks;
  const int column = block / kinds.slabs * C::kColumns, rank = block % kinds.slabs * kRanks;
  const int row = part * p.segment, end = min(row + p.segment, layer.m);
  const bool waits = of_da && p.fused;
  const int first_panel = row / S::kRows, last_panel = (end + S::kRows - 1) / S::kRows;
  if (waits) {
    for (int panel = first_panel; panel < last_panel; ++panel) wait(p.flags + panel, 1);
  }
  const void* factor = of_da ? p.dxa : p.xa;
  const Source left = from_column(matrix<T>({const_cast<void*>(factor), layer.r}, end, layer.r), rank);
  const Source right = of_da ? matrix<T>(p.x, end, layer.k) : matrix<T>(p.dy, end, layer.n);
  BlockSums<S, kRanks> sums;
  if (of_da) {
    row_sums<T, S, kRanks, kDropout, kInChunks>(sums, layer, left, right, row, column, true, false, shared);
  } else {
    row_sums<T, S, kRanks, false, kInChunks>(sums, layer, left, right, row, column, p.db, p.dbias && rank == 0, shared);
  }
  if (waits) {
    const int last = (p.dx ? p.grid.columns : 0) + kinds.da_blocks;
    for (int panel = first_panel; panel < last_panel; ++panel) leave(p.flags + panel, last);
  }
  const int slot = (of_da ? kinds.db_blocks : 0) + block;
  float* space = p.partials + static_cast<int64_t>(slot) * kinds.parts * C::kSpace;
  if (!sum_of_parts<S, kRanks>(sums, space, p.counters + slot, part, kinds.parts, shared)) return;
  const Block to{rank, column, layer.r, of_da ? layer.k : layer.n};
  if (of_da) {
    store_by_rank<T, S, kRanks>(sums, to, p.da, p.adapter_gradients_are_float, shared);
  } else {
    if (p.db) store_by_column<T, S, kRanks>(sums, to, p.db, scaling_of(layer), p.adapter_gradients_are_float, shared);
    if (p.dbias && rank == 0) store_totals<T, S, kRanks>(sums, to, p.dbias);
  }
}

// With `fused` the first tiles make dxa [m, r] and publish it before they wait for anything: no tile waits for one
// that can't run. Persistent; the grid is resident as a whole.
template <class T, class S, int kRanks, bool kDropout, bool kInChunks>
__device__ inline void backward(const BackwardParams& p) {
  extern __shared__ __align__(128) char memory[];
  const uint32_t shared = shared_address(memory);
  const Kinds& kinds = p.kinds;
  for (int tile = blockIdx.x; tile < kinds.all; tile += gridDim.x) {
    if (tile < kinds.dxa || tile >= kinds.da) {
      dx_tile<T, S, kRanks, kDropout, kInChunks>(p, tile, shared);
    } else {
      const bool of_da = tile >= kinds.db;
      sum_tile<T, S, kRanks, kDropout, kInChunks>(p, tile - (of_da ? kinds.db : kinds.dxa), of_da, shared);
    }
  }
}

}  // namespace lora_kernels

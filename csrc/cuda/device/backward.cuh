// dx = dy W + D(dxa A), dA = dxaT D(x), dB = scaling * dyT xa and dbias in one launch, by kinds of tiles;
// dxa = scaling * dy B, with dropout's factor in it, so that it is rounded once.
//
// A program takes tiles by number until there are none. There are four kinds, in this order:
//
// 1. The first columns of dx, one for each slice of ranks. A tile sums dy W and its slice of dxa over N in one loop, stores
//    the slice and publishes it by its row panel's flag. It waits for the other slices, adds D(dxa A) and stores dx.
// 2. dB and dbias. A tile sums dyT xa, and dy itself, over the rows of a segment. It waits for nothing.
// 3. dA. A tile waits for the dxa of its segment's rows, draws D, leaves D's bits for the tiles of dx that follow, and sums
//    dxaT D(x).
// 4. The other columns of dx. A tile sums dy W, waits for dxa and for D's bits, adds D(dxa A) and stores dx.
//
// Where dx isn't wanted, or has too few columns, tiles of their own take the place of the first kind and make dxa alone.
//
// Tiles of dA and dB take rows in order, and whoever comes last adds the segments in order: no atomics on results, the same
// bits in every run. They stand between the two kinds of dx: memory-bound work beside compute-bound work.
// docs/kernels.md draws this, and says why no order of programs can deadlock.

#pragma once

#include "sums.cuh"

namespace lora_kernels {

__device__ inline bool is_of_dx(const Kinds& kinds, int tile) { return tile < kinds.dxa || tile >= kinds.da; }

// A tile of dx, and of dxa if it is one of the first.
template <class S, int kRanks>
__device__ inline LargeTile dx_tile_at(const BackwardParams& p, int tile) {
  return large_tile<S, kRanks>(p.grid, p.shrink, tile, p.kinds.da - p.kinds.dxa);
}

// What a tile of dx waits for: the makers of its rows' dxa, and where tiles of dA draw the mask, that the makers and all of
// these have left.
__device__ inline int arrivals_before(const BackwardParams& p, const LargeTile& tile) {
  return p.shrink.slices + (p.mask.bits && !tile.shrinks ? p.shrink.xa_columns + p.kinds.da_blocks : 0);
}

// What the last tile to leave a row panel finds in its flag.
__device__ inline int last_to_leave(const BackwardParams& p) {
  return p.shrink.slices + (p.dx ? p.grid.columns : 0) + (p.da ? p.kinds.da_blocks : 0) - 1;
}

// In what dxa's numbers are.
template <class T, class S, int kRanks>
__device__ inline auto units_of(const BackwardParams& p) {
  if constexpr (std::is_same_v<T, __half>) {
    return Units<S, kRanks>{p.units, p.shrink.slices};
  } else {
    return NoUnits{};
  }
}

// Stores a tile's dxa, and its unit.
template <class T, class S, int kRanks>
__device__ inline void store_dxa(const BackwardParams& p, const ShrinkSums<kRanks>& shrink, const LargeTile& tile,
                                 const Place<S>& place, uint32_t shared) {
  const Layer& layer = p.layer;
  float scale = scaling_of(layer) * keep_scale(layer);
  if constexpr (std::is_same_v<T, __half>) {
    const float unit = unit_of<S>(shrink, scale, shared);
    if (threadIdx.x == 0) p.units[tile.panel * p.shrink.slices + tile.rank / kRanks] = unit;
    scale *= inverse_of(unit);
  }
  store_shrink<T>(shrink, scale, p.dxa, tile.row + place.shrink_row, layer.m, tile.rank, layer.r);
}

// D of a tile of dx; to be made when what it waits for is there.
template <class S, bool kDropout>
__device__ inline auto mask_of(const BackwardParams& p, const LargeTile& tile, const Place<S>& place) {
  if constexpr (kDropout) {
    return TileMask<S>(p.layer, p.mask, p.mask.bits && !tile.shrinks, place, tile.row, tile.column);
  } else {
    return NoMask{};
  }
}

// A tile of dx, of dxa, or of both.
template <class T, class S, int kRanks, bool kDropout, bool kInChunks>
__device__ inline void dx_tile(const BackwardParams& p, int tile, Numbers& numbers, uint32_t shared) {
  const Layer& layer = p.layer;
  const bool alone = tile < p.shrink.alone;
  const LargeTile of = alone ? shrink_tile<S, kRanks>(p.shrink, tile) : dx_tile_at<S, kRanks>(p, tile);
  const auto [row, column, panel, rank, shrinks] = of;
  const Operands operands{layer, matrix<T>(p.dy, layer.m, layer.n), weight<T>(layer),
                          adapter<T>(layer, layer.b, layer.n, layer.r), row, column, layer.n, {}, rank};
  const Place<S> place;
  Sums<S> sums;
  ShrinkSums<kRanks> shrink;
  products<T, S, kRanks, ProductMode{.by_depth = true, .dropout = false, .in_chunks = kInChunks}>(
      sums, shrink, operands, shrinks, alone, shared);
  if (shrinks) {
    store_dxa<T>(p, shrink, of, place, shared);
    publish(p.flags + panel);
  }
  if (!alone) wait(p.flags + panel, arrivals_before(p, of));
  numbers.take();
  if (alone) return;
  const Operands low_rank{layer, matrix<T>({const_cast<void*>(p.dxa), layer.r}, layer.m, layer.r),
                          adapter<T>(layer, layer.a, layer.r, layer.k), {}, row, column, layer.r};
  const auto unit_at = [&](int rank) { return units_of<T, S, kRanks>(p).at(of.row, rank); };
  add_low_rank<T, S, kRanks, true>(sums, place, mask_of<S, kDropout>(p, of, place), low_rank, unit_at, shared);
  leave(p.flags + panel, last_to_leave(p));
  store_sums<T, S>(sums, place, p.dx, row, column, layer.m, layer.k, shared);
}

// A tile of dB and dbias, or of dA: rows from `row` to `end` of a block of columns and ranks.
struct SumTile {
  bool of_da;
  int block, part, column, rank, row, end;

  template <class S, int kRanks>
  static __device__ SumTile at(const BackwardParams& p, int tile) {
    const Kinds& kinds = p.kinds;
    const bool of_da = tile >= kinds.db;
    const int index = tile - (of_da ? kinds.db : kinds.dxa), blocks = of_da ? kinds.da_blocks : kinds.db_blocks;
    const int block = index % blocks, part = index / blocks, row = part * p.segment;
    return {of_da, block, part, block / kinds.slabs * SumShape<S, kRanks>::kColumns, block % kinds.slabs * kRanks, row,
            min(row + p.segment, p.layer.m)};
  }
  // The row panels whose dxa it reads.
  template <class S, class F>
  __device__ void for_each_panel(F f) const {
    for (int panel = row / S::kRows; panel * S::kRows < end; ++panel) f(panel);
  }
};

// What a tile of dB and dbias sums.
__device__ inline SumsWanted wanted_of_db(const BackwardParams& p, const SumTile& tile) {
  return {.product = p.db != nullptr, .totals = p.dbias && tile.rank == 0};
}

// Adds a tile's sums to those of its other parts and stores the whole if it is the last one.
template <class T, class S, int kRanks>
__device__ inline void finish_sums(const BackwardParams& p, const SumTile& tile, BlockSums<S, kRanks>& sums, uint32_t shared) {
  const Layer& layer = p.layer;
  const int slot = (tile.of_da ? p.kinds.db_blocks : 0) + tile.block;
  float* space = p.partials + static_cast<int64_t>(slot) * p.kinds.parts * SumShape<S, kRanks>::kSpace;
  if (!sum_of_parts<S, kRanks>(sums, space, p.counters + slot, tile.part, p.kinds.parts, shared)) return;
  const Block to{tile.rank, tile.column, layer.r, tile.of_da ? layer.k : layer.n};
  if (tile.of_da) {
    store_by_rank<T, S, kRanks>(sums, to, p.da, p.adapter_gradients_are_float, shared);
  } else {
    if (p.db) store_by_column<T, S, kRanks>(sums, to, p.db, scaling_of(layer), p.adapter_gradients_are_float, shared);
    if (p.dbias && tile.rank == 0) store_totals<T, S, kRanks>(sums, to, p.dbias);
  }
}

template <class T, class S, int kRanks, bool kDropout, bool kInChunks>
__device__ inline void sum_tile(const BackwardParams& p, int index, Numbers& numbers, uint32_t shared) {
  const Layer& layer = p.layer;
  const SumTile tile = SumTile::at<S, kRanks>(p, index);
  if (tile.of_da) tile.for_each_panel<S>([&](int panel) { wait(p.flags + panel, p.shrink.slices); });
  const void* factor = tile.of_da ? p.dxa : p.xa;
  const Source left = from_column(matrix<T>({const_cast<void*>(factor), layer.r}, tile.end, layer.r), tile.rank);
  const Source right = tile.of_da ? matrix<T>(p.x, tile.end, layer.k) : matrix<T>(p.dy, tile.end, layer.n);
  BlockSums<S, kRanks> sums;
  if (tile.of_da) {
    row_sums<T, S, kRanks, SumMode{.dropout = kDropout, .in_chunks = kInChunks}>(
        sums, {layer, left, right, {}, tile.row, tile.column, tile.end, {}, tile.rank}, p.mask, units_of<T, S, kRanks>(p), SumsWanted{.product = true, .totals = false}, shared);
  } else {
    row_sums<T, S, kRanks, SumMode{.dropout = false, .in_chunks = kInChunks}>(
        sums, {layer, left, right, {}, tile.row, tile.column, tile.end, {}, tile.rank}, {}, NoUnits{}, wanted_of_db(p, tile), shared);
  }
  numbers.take();
  if (tile.of_da) tile.for_each_panel<S>([&](int panel) { leave(p.flags + panel, last_to_leave(p)); });
  finish_sums<T>(p, tile, sums, shared);
}

// The first tiles make dxa [m, r], each a slice of ranks, and publish it before they wait for anything. Persistent.
template <class T, class S, int kRanks, bool kDropout, bool kInChunks>
__device__ inline void backward(const BackwardParams& p) {
  extern __shared__ __align__(128) char memory[];
  const uint32_t shared = shared_address(memory);
  const Kinds& kinds = p.kinds;
  Numbers numbers{p.ticket, shared + backward_bytes<S>(kRanks)};
  numbers.take();
  for (int tile; (tile = numbers.next()) < kinds.all;) {
    if (is_of_dx(kinds, tile)) {
      dx_tile<T, S, kRanks, kDropout, kInChunks>(p, tile, numbers, shared);
    } else {
      sum_tile<T, S, kRanks, kDropout, kInChunks>(p, tile, numbers, shared);
    }
  }
}

}  // namespace lora_kernels

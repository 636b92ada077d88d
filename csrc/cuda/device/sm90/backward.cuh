// The backward of backward.cuh for sm_90a: the same tiles, numbers and flags, by two sides of a program; see
// pipeline.cuh.
//
// For a tile of dx the side that copies starts dy and W step by step, with B's where the tile makes dxa, waits for dxa, and
// copies dxa and A; the side that multiplies makes dy W by wgmma, dxa where the tile makes it, then D(dxa A). For a tile of
// dA or dB the steps are rows: x or dy lies where W does otherwise, dxa or xa where B does, and the side that multiplies
// draws D and drops x's elements in place.

#pragma once

#include "../backward.cuh"
#include "pipeline.cuh"

namespace lora_kernels {

// D of a tile of dx as TileMask has it, whose rows are whole blocks of the mask's columns: a thread of a quad loads a word of
// four, which the others have from it.
template <class S>
struct QuadMask {
  static constexpr int kBlocks = S::kColumns / kSumColumns;
  Mask mask;
  bool loaded;
  uint32_t words[2][kBlocks];  // of rows row(0) and row(0) + 8

  __device__ QuadMask(const BackwardParams& p, const LargeTile& tile, const Place<S>& place)
      : mask(p.layer), loaded(p.mask.bits && !tile.shrinks) {
    if (!loaded) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(tile.row + place.row(0) + 8 * half, p.layer.m - 1);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        // Beyond x there is no block; its columns aren't stored.
        const int further = tile.column + block * kSumColumns, column = further < p.layer.k ? further : tile.column;
        words[half][block] = load_fresh_word(byte_of(p.mask, row, column) + 4 * place.t);
      }
    }
  }

  template <int i, int j>
  __device__ uint32_t bits(int row, int group, int t) const {
    if (!loaded) return mask.quad_bits(row, group, t);
    const auto word = [&](int half) { return __shfl_sync(0xFFFFFFFFu, words[half][j / 8], j / 2 % 4, 4); };
    return permute<j % 2 ? 0x7362 : 0x5140>(word(0), word(1));
  }
};

template <class T, class S, int kRanks>
__device__ inline void copy_backward(const HopperBackwardParams& params, const HopperMemory<T, S, kRanks, true>& memory) {
  using Memory = HopperMemory<T, S, kRanks, true>;
  const BackwardParams& p = params.backward;
  const Layer& layer = p.layer;
  const Source a = adapter<T>(layer, layer.a, layer.r, layer.k), b = adapter<T>(layer, layer.b, layer.n, layer.r);
  CopyingSide<T, S, kRanks, true> side(memory, p.ticket);
  for (int index; (index = side.next()) < p.ticket.count;) {
    if (is_of_dx(p.kinds, index)) {
      const LargeTile tile = dx_tile_at<S, kRanks>(p, index);
      for (int depth = 0; depth < layer.n; depth += S::kDepth) {
        side.begin(Memory::kBoxes);
        side.left(params.dy_map, tile.row, depth);
        side.weight(params.w_map, tile.column, depth);
        side.end(tile.shrinks, b, depth, tile.rank);
      }
      const Source dxa = matrix<T>({p.dxa, layer.r}, layer.m, layer.r);
      side.factors(p.flags + tile.panel, arrivals_before(p, tile), last_to_leave(p), dxa, tile.row, a, tile.column, layer.r);
      continue;
    }
    const SumTile tile = SumTile::at<S, kRanks>(p, index);
    if (tile.of_da) tile.for_each_panel<S>([&](int panel) { side.wait(p.flags + panel, p.shrink.slices); });
    side.take();
    const void* factor = tile.of_da ? p.dxa : p.xa;
    const Source shrink = matrix<T>({const_cast<void*>(factor), layer.r}, tile.end, layer.r);
    for (int row = tile.row; row < tile.end; row += S::kDepth) {
      side.begin(Memory::kSumBoxes);
      side.summed(tile.of_da ? params.x_map : params.dy_map, row, tile.column);
      side.end(factor, shrink, row, tile.rank);
    }
    // Where the mask is drawn the side that draws it leaves, afterwards.
    if (tile.of_da && !p.mask.bits) tile.for_each_panel<S>([&](int panel) { side.leave(p.flags + panel, last_to_leave(p)); });
  }
  side.pass();
}

// The sums of a tile and the totals of its columns.
template <class T, class S, int kRanks, bool kDropout, class TheUnits>
__device__ inline void ring_sums(BlockSums<S, kRanks>& sums, MultiplyingSide<T, S, kRanks, true>& side, const Mask& mask,
                                 const DrawnMask& drawn, const TheUnits& units, const SumTile& tile,
                                 const SumsWanted& wanted) {
  using M = HopperMemory<T, S, kRanks, true>;
  using C = SumShape<S, kRanks>;
  static_assert(C::kRowsOfStep == S::kDepth && kHopperBox % C::kWarpColumns == 0, "a warp's columns lie in one box");
  const int column = threadIdx.x / 32 * C::kWarpColumns;
  const LeftReaderByDepth<typename M::Shrink> left_reader(0);
  const RightReader<typename M::Box, true> right_reader(column % kHopperBox);
  sums.clear();
  // The units are there once the first step is, whose copies waited for them.
  if constexpr (!std::is_same_v<TheUnits, NoUnits>) wait_for_phase_in_time(side.memory.filled(side.at.stage), side.at.parity);
  RunningUnit<TheUnits> unit(units, tile.row, tile.rank);
  for (int row = tile.row; row < tile.end; row += S::kDepth) {
    const int stage = side.at.stage;
    wait_for_phase_in_time(side.memory.filled(stage), side.at.parity);
    unit.advance(sums, min(row + S::kDepth, tile.end - 1));
    const uint32_t right = side.memory.right(stage);
    if (kDropout) {
      drop<typename M::Box, S::kThreads>(right, row, tile.column, mask, drawn);
      drop<typename M::Box, S::kThreads>(right + M::Box::kBytes, row, tile.column + kHopperBox, mask, drawn);
      fence_stores();
      synchronize<S>();
    }
    add_rows<T>(sums, left_reader, side.memory.shrink(stage), right_reader, right + column / kHopperBox * M::Box::kBytes,
                wanted);
    __syncwarp();
    side.arrive_by_warp(side.memory.read(stage));
    side.at.advance();
  }
  unit.finish(sums);
}

template <class T, class S, int kRanks, bool kDropout>
__device__ inline void multiply_backward(const HopperBackwardParams& params, const HopperMemory<T, S, kRanks, true>& memory) {
  const BackwardParams& p = params.backward;
  const Layer& layer = p.layer;
  const int steps = (layer.n + S::kDepth - 1) / S::kDepth;
  MultiplyingSide<T, S, kRanks, true> side(memory);
  for (int index; (index = side.next()) < p.ticket.count;) {
    if (is_of_dx(p.kinds, index)) {
      const LargeTile tile = dx_tile_at<S, kRanks>(p, index);
      Sums<S> sums;
      ShrinkSums<kRanks> shrink;
      side.template product<false>(sums, shrink, layer, {}, tile.row, steps, tile.shrinks);
      if (tile.shrinks) {
        side.await_boxes();
        store_dxa<T>(p, shrink, tile, side.place, memory.out());
        publish<S>(p.flags + tile.panel);
      }
      const Operands at{layer, {}, {}, {}, tile.row, tile.column, layer.r};
      const auto unit_at = [&](int rank) { return units_of<T, S, kRanks>(p).at(tile.row, rank); };
      const auto make_mask = [&] {
        if constexpr (kDropout) {
          return QuadMask<S>(p, tile, side.place);
        } else {
          return NoMask{};
        }
      };
      side.add_factors(sums, make_mask, at, unit_at);
      if (params.stores_boxes) {
        side.store(sums, params.dx_map, tile.row, tile.column);
      } else {
        store_sums<T, S>(sums, Place<S>(), p.dx, tile.row, tile.column, layer.m, layer.k, memory.out());
      }
      continue;
    }
    const SumTile tile = SumTile::at<S, kRanks>(p, index);
    BlockSums<S, kRanks> sums;
    if (tile.of_da) {
      ring_sums<T, S, kRanks, kDropout>(sums, side, Mask(layer), p.mask, units_of<T, S, kRanks>(p), tile, SumsWanted{.product = true, .totals = false});
      if (p.mask.bits) tile.for_each_panel<S>([&](int panel) { leave<S>(p.flags + panel, last_to_leave(p)); });
    } else {
      ring_sums<T, S, kRanks, false>(sums, side, Mask(layer), {}, NoUnits{}, tile, wanted_of_db(p, tile));
    }
    side.await_boxes();
    finish_sums<T>(p, tile, sums, memory.out());
    // The stores may have divided warps, and the next tile's products need whole ones.
    synchronize<S>();
  }
  wait_for_boxes();
}

template <class T, class S, int kRanks, bool kDropout>
__device__ inline void backward_sm90(const HopperBackwardParams& params) {
  run_sides<HopperMemory<T, S, kRanks, true>, S>([&](const auto& memory) { copy_backward<T, S, kRanks>(params, memory); },
                                                 [&](const auto& memory) {
                                                   multiply_backward<T, S, kRanks, kDropout>(params, memory);
                                                 });
}

}  // namespace lora_kernels

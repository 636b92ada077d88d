// The product of a tile whose warps have many sums, without a branch: a slice's fragments are loaded while the one before
// is multiplied, over the ends of steps too. So a step's barrier comes before its last products, when all warps have read it.
// Of the right operand each fragment gives way to its successor, which waits for no more than the products between.

#pragma once

#include "mainloop.cuh"

namespace lora_kernels {

// The copies of a loop's steps, in order, to the stages that it names; after the last step of zeros, which nobody reads.
template <class T, class S, int kRanks, ProductMode kMode, bool kShrink>
struct CopiesAhead {
  static constexpr bool kByDepth = kMode.by_depth;
  using R = Ring<T, S, kRanks, kByDepth>;
  using Shrink = typename R::Shrink;

  WholeStream<T, typename R::Left, S::kThreads, false> left;
  WholeWeightStream<T, S, kByDepth> right;
  ShrinkFetch<T, Shrink, S::kThreads> fetched;
  ShrinkStream<T, Shrink, S::kThreads, kByDepth> shrink;
  const Operands& operands;
  // Of the shrink operand this thread copies a chunk, or fetches and stores it.
  bool copies_shrink, stores_shrink;

  __device__ explicit CopiesAhead(const Operands& o)
      : left(o.left, o.row, 0),
        right(o.right, o.column),
        shrink(kByDepth ? from_column(o.shrink, o.rank) : from_row(o.shrink, o.rank)),
        operands(o),
        copies_shrink(kShrink && kept_in_register(has_shrink() && o.shrink.in_chunks)),
        stores_shrink(kShrink && kept_in_register(has_shrink() && !o.shrink.in_chunks)) {}
  __device__ static bool has_shrink() { return threadIdx.x < Shrink::kRows * Shrink::kChunks; }

  // Starts the copies of the next step, from `depth` on; what goes by registers is only fetched.
  __device__ void start(uint32_t stage, int depth) {
    left.copy(stage);
    right.copy(stage + R::kRight);
    if (copies_shrink) shrink.copy(stage + R::kShrink);
    if (stores_shrink) fetched.fetch(operands.shrink, kByDepth ? depth : operands.rank, kByDepth ? operands.rank : depth);
  }
  // Stores what was fetched.
  __device__ void finish(uint32_t stage) const {
    if (stores_shrink) fetched.store(stage + R::kShrink);
  }
};

// sums += left right for 16 columns from 16 j on.
template <class T, class S>
__device__ inline void multiply_columns(Sums<S>& sums, int j, const Left<T> (&left)[S::kBlocksM], const Right<T>& right) {
#pragma unroll
  for (int i = 0; i < S::kBlocksM; ++i) {
    multiply<T>(sums.v[i][2 * j], left[i], right[0], right[1]);
    multiply<T>(sums.v[i][2 * j + 1], left[i], right[2], right[3]);
  }
}

// Where a thread reads the slices of a step's tiles.
template <class T, class S, int kRanks, bool kByDepth>
struct SliceReader {
  using R = Ring<T, S, kRanks, kByDepth>;
  static constexpr int kSlices = S::kDepth / kDeep<T>;

  LeftReader<typename R::Left> left;
  RightReader<typename R::Right, kByDepth> right;
  RightReader<typename R::Shrink, kByDepth> shrink;
  uint32_t to_shrink_rows;  // from where a lane reads the left operand to where it reads the rows that it shrinks
  uint32_t left_slices[kSlices];

  __device__ explicit SliceReader(const Place<S>& place) : left(place.warp_row), right(place.warp_column), shrink(0) {
    to_shrink_rows = kept_in_register((place.shrink_row - place.warp_row) * R::Left::kRowBytes);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) left_slices[slice] = kept_in_register(left.at(0, slice));
  }
  template <int kSlice>
  __device__ void load_left(Left<T> (&to)[S::kBlocksM], uint32_t stage) const {
    const uint32_t at = kept_in_register(stage + left_slices[kSlice]);
    repeat<S::kBlocksM>([&](auto i) { left.template load<16 * i>(to[i], at); });
  }
  template <int kSlice, int j>
  __device__ void load_right(Right<T>& to, uint32_t stage) const {
    right.template read<16 * j, kSlice>(to, stage + R::kRight);
  }
  // The rows that the warp shrinks, and a part of the factor.
  template <int kSlice>
  __device__ void load_rows(Left<T>& to, uint32_t stage) const {
    left.template load<0>(to, stage + left_slices[kSlice] + to_shrink_rows);
  }
  template <int kSlice, int kRank>
  __device__ void load_factor(Right<T>& to, uint32_t stage) const {
    shrink.template read<kRank, kSlice>(to, stage + R::kShrink);
  }
};

// sums = left right over all of depth; kShrink: shrink_sums = D(left) times the factor, D with dropout.
template <class T, class S, int kRanks, ProductMode kMode, bool kShrink>
__device__ __forceinline__ void product_ahead(Sums<S>& sums, ShrinkSums<kRanks>& shrink_sums, const Operands& operands,
                                              uint32_t shared) {
  using R = Ring<T, S, kRanks, kMode.by_depth>;
  using Reader = SliceReader<T, S, kRanks, kMode.by_depth>;
  static_assert(sizeof(T) == 2 && kMode.in_chunks && Reader::kSlices % 2 == 0, "16-bit elements, two slices by turns");
  constexpr bool kDrawn = kShrink && kMode.dropout;
  constexpr uint32_t kLast = R::kBytes - R::kStageBytes;
  const Place<S> place;
  using Drawn = std::conditional_t<kDrawn, DrawnLeft<S::kDepth>, NothingDrawn>;
  Drawn drawn(operands.mask, operands.layer, operands.row + place.shrink_row);
  const int steps = (operands.depth + S::kDepth - 1) / S::kDepth;
  CopiesAhead<T, S, kRanks, kMode, kShrink> copies(operands);
  const Reader reader(place);
  const auto await_next = [] {
    wait_for_copies<S::kStages - 2>();
    __syncthreads();  // also: nobody reads the stage that is filled next any more
  };

  sums.clear();
#pragma unroll 1
  for (int i = 0; i < S::kStages - 1; ++i) {
    copies.start(shared + i * R::kStageBytes, i * S::kDepth);
    copies.finish(shared + i * R::kStageBytes);
    commit_copies();
  }
  await_next();
  Left<T> left[2][S::kBlocksM];
  Right<T> right[S::kBlocksN / 2];
  reader.template load_left<0>(left[0], shared);
  repeat<S::kBlocksN / 2>([&](auto j) { reader.template load_right<0, j>(right[j], shared); });
  uint32_t stage = shared, filled = shared + kLast;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copies.start(filled, (step + S::kStages - 1) * S::kDepth);
    commit_copies();
    drawn.advance(step, steps);
    const uint32_t next = stage == shared + kLast ? shared : stage + R::kStageBytes;
    repeat<Reader::kSlices>([&](auto slice) {
      constexpr int kNext = (slice + 1) % Reader::kSlices;
      if constexpr (kShrink) {
        Left<T> kept;
        reader.template load_rows<slice>(kept, stage);
        if constexpr (kDrawn) drawn.template keep<slice>(kept);
        repeat<kRanks / 16>([&](auto j) {
          Right<T> f;
          reader.template load_factor<slice, 16 * j>(f, stage);
          multiply<T>(shrink_sums.v[2 * j], kept, f[0], f[1]);
          multiply<T>(shrink_sums.v[2 * j + 1], kept, f[2], f[3]);
        });
      }
      if (kNext == 0) await_next();
      const uint32_t from = kNext ? stage : next;
      reader.template load_left<kNext>(left[kNext % 2], from);
      repeat<S::kBlocksN / 2>([&](auto j) {
        multiply_columns<T, S>(sums, j, left[slice % 2], right[j]);
        reader.template load_right<kNext, j>(right[j], from);
      });
    });
    copies.finish(filled);
    filled = stage;
    stage = next;
  }
  wait_for_copies<0>();
  __syncthreads();
}

// The products of a tile, the shrink's where it is a shrinking one; that alone where the other isn't wanted. float32 has
// no registers to spare for a third loop: it makes both then. The planner has no shape that loads ahead make it alone.
template <class T, class S, int kRanks, ProductMode kMode>
__device__ __forceinline__ void products(Sums<S>& sums, ShrinkSums<kRanks>& shrink, const Operands& operands, bool shrinks,
                                         bool alone, uint32_t shared) {
  if constexpr (S::kAhead) {
    if (shrinks) {
      product_ahead<T, S, kRanks, kMode, true>(sums, shrink, operands, shared);
    } else {
      product_ahead<T, S, kRanks, kMode, false>(sums, shrink, operands, shared);
    }
  } else if (alone && sizeof(T) == 2) {
    product<T, S, kRanks, kMode, Makes::kShrink>(sums, shrink, operands, shared);
  } else if (shrinks) {
    product<T, S, kRanks, kMode, Makes::kBoth>(sums, shrink, operands, shared);
  } else {
    product<T, S, kRanks, kMode, Makes::kLarge>(sums, shrink, operands, shared);
  }
}

}  // namespace lora_kernels

// The product of a large tile, multi-stage: copies run ahead of the tensor cores. A shrinking tile makes
// the shrink with a low-rank factor on the way, from the operand fragments it has in registers, or nothing else.

#pragma once

#include <type_traits>

#include "mask.cuh"
#include "../host/shapes.h"
#include "weights.cuh"

namespace lora_kernels {

// Where a thread's sums lie in the tile: block (i, j) has rows row(i), row(i) + 8 and columns column(j) + 0, 1.
template <class S>
struct Place {
  int warp_row, warp_column, shrink_row, group, t;

  __device__ Place() {
    // Where a warp has many sums, as a number of this tile: what follows from it isn't kept over other tiles.
    const uint32_t thread = S::kAhead ? kept_in_register(threadIdx.x) : threadIdx.x;
    const int warp = thread / 32, lane = thread % 32;
    warp_row = warp / S::kWarpsN * S::kWarpRows;
    warp_column = warp % S::kWarpsN * S::kWarpColumns;
    shrink_row = warp_row + warp % S::kWarpsN * 16;  // the block that this warp shrinks
    group = lane / 4;
    t = lane % 4;
  }
  __device__ int row(int i) const { return warp_row + 16 * i + group; }
  __device__ int column(int j) const { return warp_column + 8 * j + 2 * t; }
};

template <class S>
struct Sums {
  float v[S::kBlocksM][S::kBlocksN][4];
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < S::kBlocksM; ++i) {
#pragma unroll
      for (int j = 0; j < S::kBlocksN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) v[i][j][e] = 0;
      }
    }
  }
  __device__ void add(const Sums& other) {
#pragma unroll
    for (int i = 0; i < S::kBlocksM; ++i) {
#pragma unroll
      for (int j = 0; j < S::kBlocksN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) v[i][j][e] += other.v[i][j][e];
      }
    }
  }
};

template <int kRanks>
struct ShrinkSums {
  float v[kRanks / 8][4] = {};
};

enum class Makes { kLarge, kBoth, kShrink };  // of the two products

struct ProductMode {
  bool by_depth;   // whether W lies [depth, columns]
  bool dropout;    // whether the shrink is of D(left)
  bool in_chunks;  // whether rows of both operands are known to allow chunks
};

// Shared memory of a loop: a ring of stages, each with both operands and the shrink's.
// kByDepth: the right operand lies [depth, columns], not [columns, depth]; so does the shrink's.
template <class T, class S, int kRanks, bool kByDepth>
struct Ring {
  static_assert(sizeof(T) == S::kSize, "a shape for elements of this size");
  using Left = Tile<T, S::kRows, S::kDepth>;
  using Right = WeightTile<T, S, kByDepth>;
  using Shrink = std::conditional_t<kByDepth, DeepTile<T, S::kDepth, kRanks>, Tile<T, kRanks, S::kDepth>>;
  static constexpr int kRight = Left::kBytes, kShrink = kRight + Right::kBytes;
  static constexpr int kStageBytes = kShrink + Shrink::kBytes, kBytes = S::kStages * kStageBytes;
  static_assert(kBytes == ring_bytes<S>(kRanks), "what the host asks for");
};

// Copies the shrink operand by registers where chunks can't be: fetched while a step is computed, stored after.
// Not float32's, whose loop has none to spare: stored at once.
template <class T, class ShrinkTile, int kThreads>
struct ShrinkFetch {
  static constexpr int kChunks = ShrinkTile::kRows * ShrinkTile::kChunks, kCopies = (kChunks + kThreads - 1) / kThreads;
  static_assert(kCopies == 1 || kChunks % kThreads == 0, "a thread has all of its chunks, or none");
  uint4 chunks[kCopies];

  __device__ void fetch(const Source& from, int row, int column) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = i * kThreads + threadIdx.x;
      chunks[i] = fetch_chunk<T>(from, row + index / ShrinkTile::kChunks, column + index % ShrinkTile::kChunks * kChunk<T>);
    }
  }
  __device__ void store(uint32_t to) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = i * kThreads + threadIdx.x;
      store_chunk(to + ShrinkTile::offset(index / ShrinkTile::kChunks, index % ShrinkTile::kChunks), chunks[i]);
    }
  }
};

// Copies the shrink operand by chunks, 16-bit elements along its rows or columns: each thread's addresses are advanced.
template <class T, class ShrinkTile, int kThreads, bool kAlongRows>
struct ShrinkStream {
  static constexpr int kChunks = ShrinkTile::kRows * ShrinkTile::kChunks, kCopies = (kChunks + kThreads - 1) / kThreads;
  static constexpr int kRowStep = kThreads / ShrinkTile::kChunks;
  const Bits<T>* next;
  int64_t row_step;
  int rows_left;            // from the thread's first chunk on
  int bytes_left[kCopies];  // of each chunk's row from there on; along columns none where there is no such row
  int first;
  static_assert(kRowStep % 8 == 0, "copies of a thread lie at rows with one permutation");

  __device__ explicit ShrinkStream(const Source& from)
      : next(static_cast<const Bits<T>*>(from.data) + own_row() * from.stride + own_column()),
        row_step(from.stride),
        rows_left(from.rows - own_row()),
        first(kept_in_register(ShrinkTile::offset(own_row(), threadIdx.x % ShrinkTile::kChunks))) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool there = kAlongRows || i * kRowStep < rows_left;
      bytes_left[i] = there ? static_cast<int>(sizeof(T)) * (from.columns - own_column()) : 0;
    }
  }
  __device__ static int own_row() { return threadIdx.x / ShrinkTile::kChunks; }
  __device__ static int own_column() { return threadIdx.x % ShrinkTile::kChunks * kChunk<T>; }

  __device__ void copy(uint32_t to) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool there = !kAlongRows || i * kRowStep < rows_left;
      copy_async(to + first + i * kThreads * 16, next + i * kRowStep * row_step, there ? min(max(bytes_left[i], 0), 16) : 0);
      if (!kAlongRows) bytes_left[i] -= ShrinkTile::kRowBytes;
    }
    next += kAlongRows ? ShrinkTile::kRows * row_step : ShrinkTile::kColumns;
    if (kAlongRows) rows_left -= ShrinkTile::kRows;
  }
};

// The operands of a tile's product at (row, column) and, for a shrinking tile, the low-rank factor.
struct Operands {
  const Layer& layer;
  Source left, right, shrink;  // right: W, but for low-rank products and sums
  int row, column, depth;
  PackedMask mask = {};
  int rank = 0;  // the shrink's first that counts
};

// The copies of a loop's steps into its ring, in order.
template <class T, class S, int kRanks, ProductMode kMode, Makes kMakes>
struct Copies {
  static constexpr bool kByDepth = kMode.by_depth;
  using R = Ring<T, S, kRanks, kByDepth>;
  using Shrink = typename R::Shrink;

  Stream<T, typename R::Left, S::kThreads, StreamMode{.along_rows = false, .in_chunks = kMode.in_chunks}> left;
  WeightStream<T, S, kByDepth, kMode.in_chunks> right;
  ShrinkFetch<T, Shrink, S::kThreads> fetched;
  ShrinkStream<T, Shrink, S::kThreads, kByDepth> shrink;
  const Operands& operands;
  int step = 0;
  uint32_t stage, end;
  // Of a 16-bit shrink operand this thread copies a chunk or more, or fetches and stores it.
  static constexpr bool kShrink = kMakes != Makes::kLarge, kStreams = kShrink && sizeof(T) == 2;
  bool copies_shrink, stores_shrink;

  __device__ Copies(const Operands& o, uint32_t shared)
      : left(o.left, o.row, 0),
        right(o.right, o.column),
        shrink(kByDepth ? from_column(o.shrink, o.rank) : from_row(o.shrink, o.rank)),
        operands(o),
        stage(shared),
        end(shared + R::kBytes),
        copies_shrink(kStreams && kept_in_register(has_shrink() && o.shrink.in_chunks)),
        stores_shrink(kStreams && kept_in_register(has_shrink() && !o.shrink.in_chunks)) {}
  __device__ static bool has_shrink() { return threadIdx.x < Shrink::kRows * Shrink::kChunks; }

  // Starts the copies of the next step; what goes by registers is only fetched.
  __device__ void start() {
    left.copy(stage);
    if (kMakes != Makes::kShrink) right.copy(stage + R::kRight);
    const int row = kByDepth ? step * S::kDepth : operands.rank, column = kByDepth ? operands.rank : step * S::kDepth;
    if (copies_shrink) shrink.copy(stage + R::kShrink);
    if (stores_shrink) fetched.fetch(operands.shrink, row, column);
    if (kShrink && !kStreams) copy_tile<T, Shrink, S::kThreads>(stage + R::kShrink, operands.shrink, row, column);
  }
  // Stores what was fetched and moves on.
  __device__ void finish() {
    if (stores_shrink) fetched.store(stage + R::kShrink);
    stage = stage + R::kStageBytes == end ? end - R::kBytes : stage + R::kStageBytes;
    ++step;
  }
};

// sums = left right over all of depth, shrink_sums = D(left) times the factor, D with dropout: both, or as kMakes says.
template <class T, class S, int kRanks, ProductMode kMode, Makes kMakes>
__device__ __forceinline__ void product(Sums<S>& sums, ShrinkSums<kRanks>& shrink_sums, const Operands& operands, uint32_t shared) {
  constexpr bool kByDepth = kMode.by_depth, kDropout = kMode.dropout;
  using R = Ring<T, S, kRanks, kByDepth>;
  const Place<S> place;
  const Mask mask(operands.layer);
  constexpr bool kShrink = kMakes != Makes::kLarge, kDrawn = kShrink && kDropout && sizeof(T) == 2;
  std::conditional_t<kDrawn, DrawnLeft<S::kDepth>, NothingDrawn> drawn(operands.mask, operands.layer, operands.row + place.shrink_row);
  const int steps = (operands.depth + S::kDepth - 1) / S::kDepth;
  Copies<T, S, kRanks, kMode, kMakes> copies(operands, shared);
  const LeftReader<typename R::Left> left(place.warp_row);
  const RightReader<typename R::Right, kByDepth> right(place.warp_column);
  const RightReader<typename R::Shrink, kByDepth> shrink(0);
  // From where a lane reads slices of the left operand to where it reads those of the shrink's rows.
  const uint32_t to_shrink_rows = kept_in_register((place.shrink_row - place.warp_row) * R::Left::kRowBytes);
  // Where slices lie in a stage. Short of registers the compiler would combine these anew at each step; by depth, where
  // the sums over rows take them, it may.
  constexpr bool kKept = !kByDepth && !kPlain<T>;
  constexpr int kSlices = S::kDepth / kDeep<T>;
  uint32_t left_slices[kSlices], right_slices[kSlices];
  uint32_t to_shrink = 0;  // from the right operand's to the shrink's
  if constexpr (kKept) {
    to_shrink = kept_in_register(shrink.first - right.first);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      left_slices[slice] = kept_in_register(left.at(0, slice));
      right_slices[slice] = kept_in_register(right.at(0, slice));
    }
  }

  sums.clear();
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) {
      copies.start();
      copies.finish();
    }
    commit_copies();
  }
  uint32_t stage = shared;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<S::kStages - 2>();
    // Also: nobody reads the stage that is filled next any more.
    __syncthreads();
    const bool more = copies.step < steps;
    if (more) copies.start();
    commit_copies();
    drawn.advance(step, steps);
    const auto add_step = [&](Sums<S>& to) {
      LeftMask<T> left_mask;
      repeat<S::kDepth / kDeep<T>>([&](auto slice) {
        const uint32_t left_at = kKept ? kept_in_register(stage + left_slices[slice]) : left.at(stage, slice);
        const uint32_t right_at = kKept ? kept_in_register(stage + right_slices[slice]) : 0;
        if (kShrink) {
          Left<T> kept;
          left.template load<0>(kept, left_at + to_shrink_rows);
          if constexpr (kDrawn) {
            drawn.template keep<slice>(kept);
          } else if (kDropout) {
            const int row = operands.row + place.shrink_row + place.group, column = step * S::kDepth + kDeep<T> * slice;
            left_mask.template keep<slice>(kept, mask, row, column, place.t);
          }
          repeat<kRanks / 16>([&](auto j) {
            if (j && operands.rank + 16 * j >= operands.layer.r) return;
            Right<T> f;
            if constexpr (kKept) {
              shrink.template load<16 * j, R::kShrink>(f, right_at + to_shrink);
            } else {
              shrink.template read<16 * j, slice>(f, stage + R::kShrink);
            }
            multiply_long<T>(shrink_sums.v[2 * j], kept, f[0], f[1]);
            multiply_long<T>(shrink_sums.v[2 * j + 1], kept, f[2], f[3]);
          });
        }
        // One product after the other, slice by slice: float32's operands take many registers.
        if (kPlain<T>) __syncwarp();
        if (kMakes == Makes::kShrink) return;
        Left<T> a[S::kBlocksM];
        repeat<S::kBlocksM>([&](auto i) { left.template load<16 * i>(a[i], left_at); });
        repeat<S::kBlocksN / 2>([&](auto j) {
          Right<T> b;
          if constexpr (kKept) {
            right.template load<16 * j, R::kRight>(b, right_at);
          } else {
            right.template read<16 * j, slice>(b, stage + R::kRight);
          }
#pragma unroll
          for (int i = 0; i < S::kBlocksM; ++i) {
            multiply<T>(to.v[i][2 * j], a[i], b[0], b[1]);
            multiply<T>(to.v[i][2 * j + 1], a[i], b[2], b[3]);
          }
        });
      });
    };
    if constexpr (kPlain<T>) {
      // Long chains of float32 sums err more than a library's: those of a step are summed by themselves.
      Sums<S> of_step;
      of_step.clear();
      add_step(of_step);
      sums.add(of_step);
    } else {
      add_step(sums);
    }
    if (more) copies.finish();
    stage = stage + R::kStageBytes == shared + R::kBytes ? shared : stage + R::kStageBytes;
  }
  wait_for_copies<0>();
  __syncthreads();
}

// Stores two numbers beside each other; aligned: by one access.
template <class T>
__device__ inline void store_pair(Bits<T>* to, float low, float high, bool aligned, bool both) {
  if constexpr (sizeof(T) == 4) {
    if (aligned) {
      *reinterpret_cast<float2*>(to) = make_float2(low, high);
      return;
    }
    to[0] = low;
    if (both) to[1] = high;
  } else {
    const uint32_t pair = pair_of<T>(low, high);
    if (aligned) {
      *reinterpret_cast<uint32_t*>(to) = pair;
      return;
    }
    to[0] = static_cast<uint16_t>(pair);
    if (both) to[1] = static_cast<uint16_t>(pair >> 16);
  }
}

// A row's 16 ranks, of which the threads t of a quad hold 2 t and 2 t + 1 of both halves: four neighbours for each.
template <class T>
__device__ inline uint2 four_ranks(float low0, float high0, float low1, float high1, int t) {
  const uint32_t first = pair_of<T>(low0, high0), second = pair_of<T>(low1, high1);
  const uint32_t even0 = __shfl_sync(0xFFFFFFFFu, first, 2 * t, 4), even1 = __shfl_sync(0xFFFFFFFFu, second, 2 * t, 4);
  const uint32_t odd0 = __shfl_sync(0xFFFFFFFFu, first, 2 * t + 1, 4), odd1 = __shfl_sync(0xFFFFFFFFu, second, 2 * t + 1, 4);
  return make_uint2(t < 2 ? even0 : even1, t < 2 ? odd0 : odd1);
}

// Stores a warp's 16 rows of a shrink from (row, rank) on, times scale, to out [rows, r].
template <class T, int kRanks>
__device__ inline void store_shrink(const ShrinkSums<kRanks>& shrink, float scale, void* out, int row, int rows, int rank,
                                  int r) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    // Whole sectors: 8 bytes a thread.
    if (r % 4 == 0) {
#pragma unroll
      for (int j = 0; j < kRanks / 8; j += 2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float *const low = shrink.v[j] + 2 * half, *const high = shrink.v[j + 1] + 2 * half;
          const uint2 four = four_ranks<T>(low[0] * scale, low[1] * scale, high[0] * scale, high[1] * scale, lane % 4);
          const int m = row + lane / 4 + 8 * half, first = rank + 8 * j + 4 * (lane % 4);
          store_four(static_cast<uint16_t*>(out) + static_cast<int64_t>(m) * r + first, four, m < rows && first < r);
        }
      }
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < kRanks / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = row + lane / 4 + 8 * half, first = rank + 8 * j + 2 * (lane % 4);
      if (m >= rows || first >= r) continue;
      store_pair<T>(static_cast<Bits<T>*>(out) + static_cast<int64_t>(m) * r + first, shrink.v[j][2 * half] * scale,
                    shrink.v[j][2 * half + 1] * scale, r % 2 == 0, first + 1 < r);
    }
  }
}

}  // namespace lora_kernels

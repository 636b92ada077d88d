// Sums over rows, leftT D(right): tiles of dA and dB, float32, in the order of rows.

#pragma once

#include "epilogue.cuh"
#include "order.cuh"
#include "units.cuh"

namespace lora_kernels {

// Every warp has all ranks of 16 columns of a tile, or more where warps are few.
template <class S, int kRanks>
struct SumShape {
  static constexpr int kColumns = kSumColumns, kRowsOfStep = 2 * kSumRows / S::kSize, kStages = kSumStages, kWarps = S::kThreads / 32;
  static constexpr int kWarpColumns = kColumns / kWarps, kBlocksM = kRanks / 16, kBlocksN = kWarpColumns / 8;
  static constexpr int kLeftBytes = S::kSize * kRowsOfStep * kRanks;
  static constexpr int kStageBytes = kLeftBytes + S::kSize * kRowsOfStep * kColumns;
  static_assert(kStages * kStageBytes <= sum_bytes(kRanks), "what the host asks for");
  static constexpr int kSpace = (kRanks + 1) * kColumns;  // of partial sums, with those of the columns alone
};

// A thread's part of a tile: ranks 16 i + lane / 4 (+ 8), columns of its warp 8 j + 2 (lane % 4) + 0, 1.
template <class S, int kRanks>
struct BlockSums {
  using C = SumShape<S, kRanks>;
  float v[C::kBlocksM][C::kBlocksN][4];
  float total[C::kBlocksN][4];  // of the columns; every row of the block holds the same

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < C::kBlocksN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        total[j][e] = 0;
#pragma unroll
        for (int i = 0; i < C::kBlocksM; ++i) v[i][j][e] = 0;
      }
    }
  }
  __device__ void add(const BlockSums& other) {
#pragma unroll
    for (int j = 0; j < C::kBlocksN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        total[j][e] += other.total[j][e];
#pragma unroll
        for (int i = 0; i < C::kBlocksM; ++i) v[i][j][e] += other.v[i][j][e];
      }
    }
  }
  __device__ void multiply(float factor) {
#pragma unroll
    for (int i = 0; i < C::kBlocksM; ++i) {
#pragma unroll
      for (int j = 0; j < C::kBlocksN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) v[i][j][e] *= factor;
      }
    }
  }
  // Moves the totals elsewhere, and adds such again.
  __device__ void move_totals(float (&to)[C::kBlocksN][4]) {
#pragma unroll
    for (int j = 0; j < C::kBlocksN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) to[j][e] = total[j][e], total[j][e] = 0;
    }
  }
  __device__ void add_totals(const float (&from)[C::kBlocksN][4]) {
#pragma unroll
    for (int j = 0; j < C::kBlocksN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) total[j][e] += from[j][e];
    }
  }
  __device__ static int rank(int i, int e) { return 16 * i + threadIdx.x % 32 / 4 + 8 * (e / 2); }
  __device__ static int column(int j, int e) {
    return threadIdx.x / 32 * C::kWarpColumns + 8 * j + 2 * (threadIdx.x % 4) + e % 2;
  }
};

// Which part of a result a tile holds: its first rank and column, and the result's size.
struct Block {
  int rank, column, ranks, columns;
};

// A left operand's fragment of ones.
template <class T>
__device__ inline void set_ones(Left<T>& fragment) {
  if constexpr (kPlain<T>) {
    fragment[0] = fragment[1] = make_float4(1, 1, 1, 1);
  } else if constexpr (std::is_same_v<T, Tf32>) {
    fragment[0] = fragment[1] = fragment[2] = fragment[3] = __float_as_uint(1);
  } else {
    fragment[0] = fragment[1] = fragment[2] = fragment[3] = pair_of<T>(1, 1);
  }
}

// Drops those of four float32 numbers in shared memory that two words' halves don't keep.
__device__ inline void drop_four(uint32_t at, uint32_t first, uint32_t second, const Mask& mask) {
  uint4 v = load_chunk(at);
  v.x = mask.keeps_low(first) ? v.x : 0;
  v.y = mask.keeps_high(first) ? v.y : 0;
  v.z = mask.keeps_low(second) ? v.z : 0;
  v.w = mask.keeps_high(second) ? v.w : 0;
  store_chunk(at, v);
}

// Drops elements of a tile in shared memory: a thread has eight columns of a row, one call of the mask. Leaves their
// bits to tiles of dx where that is wanted.
template <class Tile, int kThreads>
__device__ inline void drop(uint32_t tile, int row, int column, const Mask& mask, const DrawnMask& left) {
  constexpr bool kFloat = sizeof(typename Tile::Element) == 4;
  constexpr int kCalls = Tile::kColumns / 8, kRowsAtOnce = kThreads / kCalls;
  uint8_t* const bytes = byte_of(left, row + threadIdx.x / kCalls, column + 8 * (threadIdx.x % kCalls));
#pragma unroll
  for (int first = 0; first < Tile::kRows * kCalls; first += kThreads) {
    const int index = first + threadIdx.x, r = index / kCalls, c = index % kCalls;
    const uint4 words = mask.words(row + r, column / 8 + c), kept = mask.halves(words);
    store_byte_if(left.bits, bytes + first / kThreads * kRowsAtOnce * kMaskRowBytes, mask.bits(kept));
    if constexpr (kFloat) {
      // Four threads in eight take their second chunk first: at once all eight touch different banks.
      const bool second = c / 4 % 2;
      drop_four(tile + Tile::offset(r, 2 * c + second), second ? words.z : words.x, second ? words.w : words.y, mask);
      drop_four(tile + Tile::offset(r, 2 * c + 1 - second), second ? words.x : words.z, second ? words.y : words.w, mask);
    } else {
      const uint32_t at = tile + Tile::offset(r, c);
      uint4 v = load_chunk(at);
      v.x &= kept.x;
      v.y &= kept.y;
      v.z &= kept.z;
      v.w &= kept.w;
      store_chunk(at, v);
    }
  }
}

struct SumMode {
  bool dropout;    // whether the product is of D(right)
  bool in_chunks;  // whether the right operand's rows are known to allow chunks
};

// What a tile sums: leftT D(right), the totals of the right operand's columns, or both.
struct SumsWanted {
  bool product, totals;
};

// sums += leftT right, and the columns' totals, of the rows of one step in shared memory.
template <class T, class S, int kRanks, class LeftReader, class RightReader>
__device__ __forceinline__ void add_rows(BlockSums<S, kRanks>& sums, const LeftReader& left_reader, uint32_t left,
                                         const RightReader& right_reader, uint32_t right, const SumsWanted& wanted) {
  using C = SumShape<S, kRanks>;
  repeat<C::kRowsOfStep / kDeep<T>>([&](auto slice) {
    if (kPlain<T>) __syncwarp();  // as in mainloop.cuh
    Left<T> a;
    Right<T> b[C::kBlocksN / 2];
    repeat<C::kBlocksN / 2>([&](auto j) { right_reader.template read<16 * j, slice>(b[j], right); });
    const auto add_block = [&](float (&sums_of)[C::kBlocksN][4]) {
#pragma unroll
      for (int j = 0; j < C::kBlocksN; ++j) {
        multiply<T>(sums_of[j], a, b[j / 2][2 * (j % 2)], b[j / 2][2 * (j % 2) + 1]);
      }
    };
    if (wanted.product) {
      repeat<C::kBlocksM>([&](auto i) {
        left_reader.template read<16 * i, slice>(a, left);
        add_block(sums.v[i]);
      });
    }
    if (wanted.totals) {
      set_ones<T>(a);
      add_block(sums.total);
      if constexpr (std::is_same_v<T, Tf32>) {
        // A bias's gradient is no product to torch: what rounding took away is added too.
        repeat<C::kBlocksN / 2>([&](auto j) {
          right_reader.template read_as_stored<16 * j, slice>(b[j], right);
#pragma unroll
          for (int i = 0; i < 4; ++i) b[j][i] = rest_of_tf32(b[j][i]);
          round_operand<T>(b[j]);
        });
        add_block(sums.total);
      }
    }
  });
}

// sums = leftT D(right) and the columns' totals, of rows from the operands' row on. left: ranks from `rank` on.
template <class T, class S, int kRanks, SumMode kMode, class TheUnits>
__device__ __forceinline__ void row_sums(BlockSums<S, kRanks>& sums, const Operands& operands, const DrawnMask& drawn,
                                         const TheUnits& units, const SumsWanted& wanted, uint32_t shared) {
  constexpr bool kDropout = kMode.dropout, kInChunks = kMode.in_chunks;
  const Source &left = operands.left, &right = operands.right;
  const int row = operands.row, column = operands.column;
  using C = SumShape<S, kRanks>;
  using LeftTile = DeepTile<T, C::kRowsOfStep, kRanks>;
  using RightTile = DeepTile<T, C::kRowsOfStep, C::kColumns>;
  const Mask mask(operands.layer);
  const int steps = (right.rows - row + C::kRowsOfStep - 1) / C::kRowsOfStep;
  const LeftReaderByDepth<LeftTile> left_reader(0);
  const RightReader<RightTile, true> right_reader(threadIdx.x / 32 * C::kWarpColumns);
  const auto copy = [&](int step) {
    const uint32_t stage = shared + step % C::kStages * C::kStageBytes;
    const int at = row + step * C::kRowsOfStep;
    if (wanted.product) copy_tile<T, LeftTile, S::kThreads>(stage, left, at, 0);
    copy_tile<T, RightTile, S::kThreads, CopyMode{.in_chunks = kInChunks, .rolled = !kInChunks && sizeof(T) == 4}>(
        stage + C::kLeftBytes, right, at, column);
  };
  sums.clear();
  RunningUnit<TheUnits> unit(units, row, operands.rank);
  for (int step = 0; step < C::kStages - 1; ++step) {
    if (step < steps) copy(step);
    commit_copies();
  }
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<C::kStages - 2>();
    __syncthreads();
    if (step + C::kStages - 1 < steps) copy(step + C::kStages - 1);
    commit_copies();
    const uint32_t stage = shared + step % C::kStages * C::kStageBytes, tile = stage + C::kLeftBytes;
    if (kDropout) {
      drop<RightTile, S::kThreads>(tile, row + step * C::kRowsOfStep, column, mask, drawn);
      __syncthreads();
    }
    unit.advance(sums, min(row + (step + 1) * C::kRowsOfStep, right.rows - 1));
    const auto add_step = [&](BlockSums<S, kRanks>& to) {
      add_rows<T>(to, left_reader, stage, right_reader, tile, wanted);
    };
    if constexpr (kPlain<T>) {
      BlockSums<S, kRanks> of_step;
      of_step.clear();
      add_step(of_step);
      sums.add(of_step);
    } else if constexpr (std::is_same_v<T, Tf32>) {
      // The totals are float32's own sums, of each step by itself as above.
      float before[C::kBlocksN][4];
      sums.move_totals(before);
      add_step(sums);
      sums.add_totals(before);
    } else {
      add_step(sums);
    }
  }
  unit.finish(sums);
  wait_for_copies<0>();
  __syncthreads();
}

// Calls f(value, position in the space of a part) for a thread's sums.
template <class S, int kRanks, class F>
__device__ inline void for_each(BlockSums<S, kRanks>& sums, F f) {
  using C = SumShape<S, kRanks>;
#pragma unroll
  for (int j = 0; j < C::kBlocksN; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int i = 0; i < C::kBlocksM; ++i) f(sums.v[i][j][e], sums.rank(i, e) * C::kColumns + sums.column(j, e));
      if (threadIdx.x % 32 < 4 && e < 2) f(sums.total[j][e], kRanks * C::kColumns + sums.column(j, e));
    }
  }
}

// Turns a part's sums into those over all parts, in order, and returns true to the last part to arrive.
// space: float32 [parts, kRanks + 1, columns]; counter: zero before and after.
template <class S, int kRanks>
__device__ inline bool sum_of_parts(BlockSums<S, kRanks>& sums, float* space, int* counter, int part, int parts,
                                    uint32_t shared) {
  using C = SumShape<S, kRanks>;
  if (parts == 1) return true;
  for_each(sums, [&](float& value, int at) { space[static_cast<int64_t>(part) * C::kSpace + at] = value; });
  if (!last_to_arrive<S>(counter, parts, shared)) return false;
  sums.clear();
  for (int i = 0; i < parts; ++i) {
    for_each(sums, [&](float& value, int at) { value += load_fresh(space + static_cast<int64_t>(i) * C::kSpace + at, true); });
  }
  return true;
}

// Through shared memory, so that threads beside each other store numbers beside each other: f(rank, column,
// value) for the numbers of a tile, ranks or columns next to each other.
template <class S, int kRanks, bool kRanksTogether, class F>
__device__ inline void in_order(BlockSums<S, kRanks>& sums, uint32_t shared, F f) {
  using C = SumShape<S, kRanks>;
  // One number more a row than there are: rows start in different banks.
  constexpr int kPitch = (kRanksTogether ? kRanks : C::kColumns) + 1;
#pragma unroll
  for (int j = 0; j < C::kBlocksN; ++j) {
#pragma unroll
    for (int i = 0; i < C::kBlocksM; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int rank = sums.rank(i, e), column = sums.column(j, e);
        const int at = kRanksTogether ? column * kPitch + rank : rank * kPitch + column;
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared + 4 * at), "f"(sums.v[i][j][e]) : "memory");
      }
    }
  }
  synchronize<S>();
  constexpr int kInRow = kRanksTogether ? kRanks : C::kColumns;
  for (int index = threadIdx.x; index < kRanks * C::kColumns; index += S::kThreads) {
    const int row = index / kInRow, in_row = index % kInRow;
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(shared + 4 * (row * kPitch + in_row)) : "memory");
    f(kRanksTogether ? in_row : row, kRanksTogether ? row : in_row, value);
  }
  synchronize<S>();
}

// Stores the sums to out [ranks, columns].
template <class T, class S, int kRanks>
__device__ inline void store_by_rank(BlockSums<S, kRanks>& sums, const Block& b, void* out, bool is_float, uint32_t shared) {
  in_order<S, kRanks, false>(sums, shared, [&](int rank, int column, float value) {
    if (b.rank + rank >= b.ranks || b.column + column >= b.columns) return;
    store_number<T>(out, static_cast<int64_t>(b.rank + rank) * b.columns + b.column + column, value, is_float);
  });
}

// Stores the sums, times scale, to out [columns, ranks].
template <class T, class S, int kRanks>
__device__ inline void store_by_column(BlockSums<S, kRanks>& sums, const Block& b, void* out, float scale, bool is_float,
                                       uint32_t shared) {
  in_order<S, kRanks, true>(sums, shared, [&](int rank, int column, float value) {
    if (b.rank + rank >= b.ranks || b.column + column >= b.columns) return;
    store_number<T>(out, static_cast<int64_t>(b.column + column) * b.ranks + b.rank + rank, value * scale, is_float);
  });
}

// Stores the columns' totals to out [columns].
template <class T, class S, int kRanks>
__device__ inline void store_totals(BlockSums<S, kRanks>& sums, const Block& b, void* out) {
  using C = SumShape<S, kRanks>;
#pragma unroll
  for (int j = 0; j < C::kBlocksN; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = b.column + sums.column(j, e);
      if (threadIdx.x % 32 < 4 && column < b.columns) store_number<T>(out, column, sums.total[j][e], false);
    }
  }
}

}  // namespace lora_kernels

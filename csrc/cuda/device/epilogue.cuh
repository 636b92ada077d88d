// What follows a tile's product: the low-rank term, the bias, the way out to memory.

#pragma once

#include "ahead.cuh"

namespace lora_kernels {

// The mask of a tile of dx as a thread's sums lie: drawn, or loaded where tiles of dA have left it.
template <class S>
struct TileMask {
  Mask mask;
  bool loaded;
  uint32_t words[S::kBlocksM][2][S::kBlocksN / 4];  // of rows row(i) and row(i) + 8: four groups each

  __device__ TileMask(const Layer& layer, const DrawnMask& drawn, bool loaded, const Place<S>& place, int row, int column)
      : mask(layer), loaded(loaded) {
    if (!loaded) return;
#pragma unroll
    for (int i = 0; i < S::kBlocksM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* from = byte_of(drawn, min(row + place.row(i) + 8 * half, layer.m - 1), column + place.warp_column);
#pragma unroll
        for (int j = 0; j < S::kBlocksN / 4; ++j) words[i][half][j] = load_fresh_word(from + 4 * j);
      }
    }
  }

  // A byte for each of (row, group), (row + 8, group), (row, group + 1), (row + 8, group + 1), of blocks (i, 2 j) and
  // (i, 2 j + 1).
  template <int i, int j>
  __device__ uint32_t bits(int row, int group, int t) const {
    if (!loaded) return mask.quad_bits(row, group, t);
    return permute<j % 2 ? 0x7362 : 0x5140>(words[i][0][j / 2], words[i][1][j / 2]);
  }
};
struct NoMask {};

// Adds two blocks of the low-rank term, those of its elements whose bits are set; see TileMask.
__device__ inline void add_kept(float (&first)[4], float (&second)[4], const float (&low_rank)[2][4], float scale,
                                uint32_t bits, int t) {
  const uint32_t mine = bits >> t;  // lane 2 t; the odd one's bit is four on
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int place = 8 * (e / 2) + 4 * (e % 2);
    add_if(first[e], scale * low_rank[0][e], mine & 1 << place);
    add_if(second[e], scale * low_rank[1][e], mine & 1 << (16 + place));
  }
}

// sums += scale * D(left right) for kRanks ranks, `depth` of them not zero: left [rows, kRanks] and right [columns,
// kRanks], or [kRanks, columns] if kByDepth, in shared memory. D by `mask`: a TileMask, or NoMask.
template <class T, class S, int kRanks, bool kByDepth, class TheMask>
__device__ __forceinline__ void add_ranks(Sums<S>& sums, const Place<S>& place, const TheMask& mask, const Operands& at,
                                          float scale, int depth, uint32_t left, uint32_t right) {
  using LeftTile = Tile<T, S::kRows, kRanks>;
  using RightTile = std::conditional_t<kByDepth, DeepTile<T, kRanks, S::kColumns>, Tile<T, S::kColumns, kRanks>>;
  const LeftReader<LeftTile> left_reader(place.warp_row);
  const RightReader<RightTile, kByDepth> right_reader(place.warp_column);
  constexpr bool kOnce = S::kAhead && kRanks == kDeep<T>;  // a fragment serves all columns
  repeat<S::kBlocksM>([&](auto i) {
    Left<T> a;
    if (kOnce) left_reader.template read<16 * i>(a, left, 0);
    repeat<S::kBlocksN / 2>([&](auto j) {
      float low_rank[2][4] = {};
      repeat<kRanks / kDeep<T>>([&](auto slice) {
        if (kPlain<T>) __syncwarp();  // as in mainloop.cuh
        if (slice && kDeep<T> * slice >= depth) return;
        Right<T> b;
        if (!kOnce) left_reader.template read<16 * i>(a, left, slice);
        right_reader.template read<16 * j, slice>(b, right);
        multiply<T>(low_rank[0], a, b[0], b[1]);
        multiply<T>(low_rank[1], a, b[2], b[3]);
      });
      float(&first)[4] = sums.v[i][2 * j], (&second)[4] = sums.v[i][2 * j + 1];
      if constexpr (std::is_same_v<TheMask, NoMask>) {
#pragma unroll
        for (int e = 0; e < 4; ++e) first[e] += scale * low_rank[0][e], second[e] += scale * low_rank[1][e];
        if (S::kAhead && j % 2) __syncwarp();  // as many sums leave few registers for the next blocks' products
      } else {
        const int group = (at.column + place.warp_column) / 8 + 2 * j;
        add_kept(first, second, low_rank, scale, mask.template bits<i, j>(at.row + place.row(i), group, place.t), place.t);
        // The calls of the mask one after the other: together they would need too many registers.
        __syncwarp();
      }
    });
  });
}

// sums += scale * D(left right) for low-rank factors: left [rows, r], right [columns, r], or [r, columns] if
// kByDepth. No pipeline, since the depth is the rank; kRanks of it at a time, from `rank` on: scale_at(rank).
template <class T, class S, int kRanks, bool kByDepth, class TheMask, class F>
__device__ __forceinline__ void add_low_rank(Sums<S>& sums, const Place<S>& place, const TheMask& mask, const Operands& operands,
                                             F scale_at, uint32_t shared) {
  using LeftTile = Tile<T, S::kRows, kRanks>;
  using RightTile = std::conditional_t<kByDepth, DeepTile<T, kRanks, S::kColumns>, Tile<T, S::kColumns, kRanks>>;
  const uint32_t right = shared + LeftTile::kBytes;
  static_assert(LeftTile::kBytes + RightTile::kBytes == low_rank_bytes<S>(kRanks), "what the host asks for");
  constexpr CopyMode kMode{.rolled = S::kAhead, .anew = S::kAhead};
  for (int rank = 0; rank < operands.depth; rank += kRanks) {
    copy_tile<T, LeftTile, S::kThreads, kMode>(shared, operands.left, operands.row, rank);
    copy_tile<T, RightTile, S::kThreads, kMode>(
        right, operands.right, kByDepth ? rank : operands.column, kByDepth ? operands.column : rank);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    add_ranks<T, S, kRanks, kByDepth>(sums, place, mask, operands, scale_at(rank), operands.depth - rank, shared, right);
    __syncthreads();
  }
}

template <class T>
__device__ inline float number(Bits<T> bits);
template <>
__device__ inline float number<float>(float value) {
  return value;
}
template <>
__device__ inline float number<Tf32>(float value) {
  return value;
}
template <>
__device__ inline float number<__nv_bfloat16>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
template <>
__device__ inline float number<__half>(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

template <class T, class S>
__device__ inline void add_bias(Sums<S>& sums, const Place<S>& place, const Bits<T>* bias, int column, int columns) {
#pragma unroll
  for (int j = 0; j < S::kBlocksN; ++j) {
    const int n = column + place.column(j);
    const float low = n < columns ? number<T>(bias[n]) : 0.0f, high = n + 1 < columns ? number<T>(bias[n + 1]) : 0.0f;
#pragma unroll
    for (int i = 0; i < S::kBlocksM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sums.v[i][j][2 * half] += low;
        sums.v[i][j][2 * half + 1] += high;
      }
    }
  }
}

template <class T>
__device__ inline void store_number(void* to, int64_t at, float value, bool is_float) {
  if constexpr (sizeof(T) == 4) {
    static_cast<float*>(to)[at] = value;
  } else if (is_float) {
    static_cast<float*>(to)[at] = value;
  } else {
    static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(pair_of<T>(value, 0.0f));
  }
}

// Writes the sums as elements of T to out [rows, columns], through shared memory in whole rows.
template <class T, class S>
__device__ inline void store_sums(const Sums<S>& sums, const Place<S>& place, void* out, int row, int column, int rows,
                                  int columns, uint32_t shared) {
  using Out = Tile<T, S::kRows, S::kColumns, sizeof(T) / 2>;
  // A thread's two columns lie in one chunk.
  const int byte = 2 * place.t * static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < S::kBlocksM; ++i) {
#pragma unroll
    for (int j = 0; j < S::kBlocksN; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = place.row(i) + 8 * half, chunk = (place.warp_column + 8 * j) / kChunk<T> + byte / 16;
        const float low = sums.v[i][j][2 * half], high = sums.v[i][j][2 * half + 1];
        const uint32_t to = shared + Out::offset(r, chunk) + byte % 16;
        if constexpr (sizeof(T) == 4) {
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(low), "f"(high) : "memory");
        } else {
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(pair_of<T>(low, high)) : "memory");
        }
      }
    }
  }
  synchronize<S>();
  const bool chunks = in_chunks<T>(out, columns);
  // As a number of this tile: what follows from it isn't kept over other tiles, which need the registers.
  const int thread = kept_in_register(threadIdx.x);
#pragma unroll
  for (int first = 0; first < Out::kRows * Out::kChunks; first += S::kThreads) {
    const int index = first + thread, r = index / Out::kChunks, c = index % Out::kChunks;
    const int left = columns - column - c * kChunk<T>;
    if (row + r >= rows || left <= 0) continue;
    Bits<T>* to = static_cast<Bits<T>*>(out) + static_cast<int64_t>(row + r) * columns + column + c * kChunk<T>;
    const uint4 v = load_chunk(shared + Out::offset(r, c));
    if (chunks) {
      *reinterpret_cast<uint4*>(to) = v;
    } else {
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        if (e >= left) continue;
        if constexpr (sizeof(T) == 4) {
          to[e] = __uint_as_float(words[e]);
        } else {
          to[e] = static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2)));
        }
      }
    }
  }
  synchronize<S>();
}

}  // namespace lora_kernels

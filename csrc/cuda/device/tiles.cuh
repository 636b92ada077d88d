// Tiles in shared memory: where an element lies, how it gets there, how warps read it.

#pragma once

#include <type_traits>

#include "ptx.cuh"

namespace lora_kernels {

template <class T>
__device__ inline uint32_t pair_of(float low, float high);
template <>
__device__ inline uint32_t pair_of<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pair_of<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Elements of a 16-byte access.
template <class T>
constexpr int kChunk = 16 / sizeof(T);

// A register's bits of an element.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, float>;

// Rows of kColumns elements. Chunks of a row are permuted so that eight rows' chunks of one column lie in
// different banks: neither copies nor matrix loads conflict. kTogether of them stay beside each other, for accesses
// to as many from four rows at once.
template <class T, int kRowsOfTile, int kColumnsOfTile, int kTogether = 1>
struct Tile {
  using Element = T;
  static constexpr int kRows = kRowsOfTile, kColumns = kColumnsOfTile, kChunks = kColumns / kChunk<T>;
  static constexpr int kRowBytes = kChunks * 16, kBytes = kRows * kRowBytes;
  static_assert(kChunks == 2 || kChunks == 4 || kChunks % 8 == 0, "rows of 32, 64 or a multiple of 128 bytes");

  // What the chunk's number is combined with in a row.
  __device__ static constexpr int permutation(int row) {
    return kChunks >= 8 ? kTogether * row & 7 : kTogether * (row / (8 / kChunks)) & (kChunks - 1);
  }
  __device__ static constexpr int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ permutation(row)) * 16;
  }
};

// A tile whose rows are the summed dimension. Of TF32, which matrix loads can't transpose, a quad of threads reads
// four rows' pairs of chunks at once.
template <class T, int kRowsOfTile, int kColumnsOfTile>
using DeepTile = Tile<T, kRowsOfTile, kColumnsOfTile, std::is_same_v<T, Tf32> ? 2 : 1>;

// Where a matrix lies, how large it is, and how its rows may be read.
struct Source {
  const void* data;
  int64_t stride;
  int rows, columns;
  bool is_float;
  bool in_chunks;  // of the tiles' type, and every row starts at a multiple of 16 bytes
};

// The matrix without its first rows, or columns, a multiple of 16.
__device__ inline Source from_row(const Source& m, int row) {
  const int64_t bytes = m.stride * row * (m.is_float ? 4 : 2);
  return {static_cast<const char*>(m.data) + bytes, m.stride, m.rows - row, m.columns, m.is_float, m.in_chunks};
}
__device__ inline Source from_column(const Source& m, int column) {
  const int64_t bytes = static_cast<int64_t>(column) * (m.is_float ? 4 : 2);
  return {static_cast<const char*>(m.data) + bytes, m.stride, m.rows, m.columns - column, m.is_float, m.in_chunks};
}

// A chunk of elements from (row, column) on, converted; zeros beyond the matrix.
template <class T>
__device__ inline uint4 fetch_chunk(const Source& from, int row, int column) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int c = column + i * kChunk<T> / 4;
    const bool low = row < from.rows && c < from.columns, high = row < from.rows && c + 1 < from.columns;
    const int64_t at = row * from.stride + c;
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(load_fresh(static_cast<const float*>(from.data) + at, low));
    } else if (from.is_float) {
      const float* data = static_cast<const float*>(from.data) + at;
      words[i] = pair_of<T>(load_fresh(data, low), load_fresh(data + 1, high));
    } else {
      const uint16_t* data = static_cast<const uint16_t*>(from.data) + at;
      words[i] = load_fresh(data, low) | static_cast<uint32_t>(load_fresh(data + 1, high)) << 16;
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ inline void store_chunk(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ inline uint4 load_chunk(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

// float, float2 or float4 at `from` + kOffset.
template <int kOffset, class V>
__device__ inline V load_floats(uint32_t from) {
  V v;
  if constexpr (sizeof(V) == 16) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(from), "n"(kOffset)
                 : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];" : "=f"(v.x), "=f"(v.y) : "r"(from), "n"(kOffset) : "memory");
  } else {
    asm volatile("ld.shared.f32 %0, [%1 + %2];" : "=f"(v) : "r"(from), "n"(kOffset) : "memory");
  }
  return v;
}

struct CopyMode {
  int first_thread = 0;    // that copies
  bool in_chunks = false;  // whether rows are known to allow chunks when compiled
  bool rolled = false;     // chunk after chunk, for threads of few registers
  bool anew = false;       // in a loop: nothing is kept for the next turn, for threads of few registers
};

// Copies a tile at (row, column) of a matrix, by kThreads threads; zeros beyond the matrix. Asynchronous where rows allow
// chunks.
template <class T, class Tile, int kThreads, CopyMode kMode = CopyMode{}>
__device__ inline void copy_tile(uint32_t to, const Source& from, int row, int column) {
  constexpr bool kRolled = kMode.rolled;
  constexpr int kAll = Tile::kRows * Tile::kChunks;
  constexpr int kAtOnce = kRolled ? 1 : (kAll + kThreads - 1) / kThreads;
  const int thread = kMode.anew ? kept_in_register(threadIdx.x) : threadIdx.x;
#pragma unroll kAtOnce
  for (int first = 0; first < kAll; first += kThreads) {
    const int index = first + thread - kMode.first_thread;
    if (kAll % kThreads && index >= kAll) break;
    const int r = index / Tile::kChunks, c = index % Tile::kChunks;
    const uint32_t at = to + Tile::offset(r, c);
    const int first_column = column + c * kChunk<T>;
    if (kMode.in_chunks || from.in_chunks) {
      // Both numbers first, so that the choice isn't a branch, which would divide the warp.
      const int columns = min(max(from.columns - first_column, 0), kChunk<T>), inside = row + r < from.rows ? columns : 0;
      const int64_t offset = inside ? (row + r) * from.stride + first_column : 0;
      copy_async(at, static_cast<const Bits<T>*>(from.data) + offset, static_cast<int>(sizeof(T)) * inside);
    } else {
      store_chunk(at, fetch_chunk<T>(from, row + r, first_column));
    }
  }
  // A loop may have divided the warp, and matrix loads follow.
  if (kRolled) __syncwarp();
}

// ---- fragments of matrix products ----
//
// 16-bit elements: 16 deep, as mma.sync takes them, and TF32 8 deep, rounded. float32: four deep, a row's in a register
// each, as plain products of the same sums take them. A reader is made for a lane and a place in the tile; what is read
// from there on has constant offsets. The permutation of chunks and a number of chunks are combined bit by bit, so
// their byte offsets are too.

template <class T>
constexpr int kDeep = kPlain<T> ? 4 : 32 / sizeof(T);
template <class T>
struct Fragments {
  using Left = uint32_t[4];   // [16 rows, kDeep]
  using Right = uint32_t[4];  // two blocks of 8 columns, two parts each
};
template <>
struct Fragments<float> {
  using Left = float4[2];
  using Right = float4[4];
};
template <class T>
using Left = typename Fragments<T>::Left;
template <class T>
using Right = typename Fragments<T>::Right;

// What tensor cores take of a fragment's elements.
template <class T>
__device__ inline void round_operand(uint32_t (&fragment)[4]) {
  if constexpr (std::is_same_v<T, Tf32>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = near_tf32(fragment[i]);
  }
}

// Where a lane's element of TF32 lies in a tile by depth: row lane % 4, column lane / 4. Rows four further and columns
// a multiple of 8 further have the same permutation, so that they lie at constant distances.
template <class Tile>
__device__ inline int offset_by_depth(int lane) {
  static_assert(!std::is_same_v<typename Tile::Element, Tf32> || Tile::permutation(4) == Tile::permutation(0), "rows four apart");
  return Tile::offset(lane % 4, lane / 16) + lane / 4 % 4 * 4;
}

// A left operand of a tile whose rows are its rows, `row` of which are before it.
template <class Tile>
struct LeftReader {
  using T = typename Tile::Element;
  int first;  // of the lane, at slice 0

  __device__ explicit LeftReader(int row)
      : first(kept_in_register(row * Tile::kRowBytes + (kPlain<T> ? Tile::offset(threadIdx.x % 32 / 4, 0)
                                                                  : Tile::offset(threadIdx.x % 16, threadIdx.x % 32 / 16)))) {}
  // Where the lane reads a slice: 16 rows further at a constant distance.
  __device__ uint32_t at(uint32_t tile, int slice) const { return tile + (first ^ (kPlain<T> ? 16 : 32) * slice); }
  // The 16 rows from kRow on.
  template <int kRow>
  __device__ static void load(uint32_t (&to)[4], uint32_t at) {
    load_matrices<kRow * Tile::kRowBytes>(to, at);
    round_operand<T>(to);
  }
  template <int kRow>
  __device__ static void load(float4 (&to)[2], uint32_t at) {
    to[0] = load_floats<kRow * Tile::kRowBytes, float4>(at);
    to[1] = load_floats<(kRow + 8) * Tile::kRowBytes, float4>(at);
  }
  template <int kRow>
  __device__ void read(Left<T>& to, uint32_t tile, int slice) const {
    load<kRow>(to, at(tile, slice));
  }
};

// Two 8-column blocks of a right operand, of a tile that has the columns as rows, or the summed dimension if
// kByDepth; `column` columns are before them, a multiple of 16.
template <class Tile, bool kByDepth>
struct RightReader {
  using T = typename Tile::Element;
  int first;

  __device__ explicit RightReader(int column) {
    const int lane = threadIdx.x % 32, before = column * static_cast<int>(sizeof(T));
    if constexpr (std::is_same_v<T, Tf32> && kByDepth) {
      first = offset_by_depth<Tile>(lane) ^ before;
    } else if constexpr (kPlain<T>) {
      first = kByDepth ? lane % 4 * 8 ^ before : 2 * (lane % 4) * Tile::kRowBytes + column * Tile::kRowBytes;
    } else {
      first = kByDepth ? Tile::offset(lane % 16, lane / 16) ^ before
                       : Tile::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2) + column * Tile::kRowBytes;
    }
    first = kept_in_register(first);
  }
  // The 16 columns from kColumn on.
  template <int kColumn, int kSlice>
  __device__ void read(uint32_t (&to)[4], uint32_t tile) const {
    if constexpr (std::is_same_v<T, Tf32> && kByDepth) {
      read_as_stored<kColumn, kSlice>(to, tile);
    } else if constexpr (kByDepth) {
      load_matrices_transposed<kSlice * 16 * Tile::kRowBytes>(to, tile + (first ^ 2 * kColumn));
    } else {
      load<kColumn>(to, at(tile, kSlice));
      return;
    }
    round_operand<T>(to);
  }
  // Not by depth, of elements that matrix loads take: where the lane reads a slice; columns at constant distances.
  __device__ uint32_t at(uint32_t tile, int slice) const { return tile + (first ^ 32 * slice); }
  template <int kColumn, int kBytes = 0>
  __device__ static void load(uint32_t (&to)[4], uint32_t at) {
    load_matrices<kBytes + kColumn * Tile::kRowBytes>(to, at);
    round_operand<T>(to);
  }
  // TF32 by depth, not rounded.
  template <int kColumn, int kSlice>
  __device__ void read_as_stored(uint32_t (&to)[4], uint32_t tile) const {
    repeat<4>([&](auto part) {
      constexpr int kRow = 8 * kSlice + 4 * (part % 2), kBits = 4 * (kColumn + 8 * (part / 2));
      to[part] = __float_as_uint(load_floats<kRow * Tile::kRowBytes, float>(tile + (first ^ kBits)));
    });
  }
  template <int kColumn, int kSlice>
  __device__ void read(float4 (&to)[4], uint32_t tile) const {
    if constexpr (kByDepth) {
      repeat<2>([&](auto block) {
        float2 pairs[4];
        repeat<4>([&](auto k) {
          constexpr int kRow = 4 * kSlice + k;
          constexpr int kBits = 4 * (kColumn + 8 * block) ^ 16 * Tile::permutation(kRow);
          pairs[k] = load_floats<kRow * Tile::kRowBytes, float2>(tile + (first ^ kBits));
        });
        to[2 * block] = make_float4(pairs[0].x, pairs[1].x, pairs[2].x, pairs[3].x);
        to[2 * block + 1] = make_float4(pairs[0].y, pairs[1].y, pairs[2].y, pairs[3].y);
      });
    } else {
      // Rows 2 (lane % 4) and the next: what the chunk is combined with differs in the lowest bit, or in none.
      const int row = 2 * (threadIdx.x % 4);
      const uint32_t even = tile + first + (16 * kSlice ^ 16 * Tile::permutation(row));
      const uint32_t odd = tile + first + (16 * kSlice ^ 16 * Tile::permutation(row + 1));
      repeat<2>([&](auto block) {
        to[2 * block] = load_floats<(kColumn + 8 * block) * Tile::kRowBytes, float4>(even);
        to[2 * block + 1] = load_floats<(kColumn + 8 * block + 1) * Tile::kRowBytes, float4>(odd);
      });
    }
  }
};

// A left operand of a tile that has the summed dimension as rows, its rows as columns, of which `column` are before it.
template <class Tile>
struct LeftReaderByDepth {
  using T = typename Tile::Element;
  int first;

  __device__ explicit LeftReaderByDepth(int column) {
    const int lane = threadIdx.x % 32, before = column * static_cast<int>(sizeof(T));
    first = kept_in_register((std::is_same_v<T, Tf32> ? offset_by_depth<Tile>(lane)
                              : kPlain<T>             ? lane / 4 * 4
                                                      : Tile::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2)) ^ before);
  }
  template <int kColumn, int kSlice>
  __device__ void read(uint32_t (&to)[4], uint32_t tile) const {
    if constexpr (std::is_same_v<T, Tf32>) {
      repeat<4>([&](auto part) {
        constexpr int kRow = 8 * kSlice + 4 * (part / 2), kBits = 4 * (kColumn + 8 * (part % 2));
        to[part] = __float_as_uint(load_floats<kRow * Tile::kRowBytes, float>(tile + (first ^ kBits)));
      });
    } else {
      load_matrices_transposed<kSlice * 16 * Tile::kRowBytes>(to, tile + (first ^ 2 * kColumn));
    }
    round_operand<T>(to);
  }
  template <int kColumn, int kSlice>
  __device__ void read(float4 (&to)[2], uint32_t tile) const {
    repeat<2>([&](auto half) {
      float numbers[4];
      repeat<4>([&](auto k) {
        constexpr int kRow = 4 * kSlice + k;
        constexpr int kBits = 4 * (kColumn + 8 * half) ^ 16 * Tile::permutation(kRow);
        numbers[k] = load_floats<kRow * Tile::kRowBytes, float>(tile + (first ^ kBits));
      });
      to[half] = make_float4(numbers[0], numbers[1], numbers[2], numbers[3]);
    });
  }
};

}  // namespace lora_kernels

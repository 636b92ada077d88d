// y and xa for at most 16 rows in one launch, bound by the memory that W takes: every program streams its rows of W
// and a share of its columns with 16-byte loads straight to the operands of matrix products.
//
// Rows of A are computed like rows of W, as the first tiles, which never wait; then xa is published.

#pragma once

#include "epilogue.cuh"

namespace lora_kernels {

// A warp's share of x WT: float32 sums of 16 rows by kDecodeColumns rows of W, from column k to end.
template <class T>
struct DecodeSums {
  static constexpr int kBlocks = kDecodeColumns / 8;
  float v[kBlocks][4] = {};

  // One 16-byte chunk of a row; by elements where rows don't allow more or the matrix ends, which is the same for
  // all lanes.
  static __device__ uint4 chunk(const Source& from, int row, int column, int end) {
    if (from.in_chunks && end <= from.columns) {
      return __ldg(reinterpret_cast<const uint4*>(static_cast<const Bits<T>*>(from.data) + row * from.stride + column));
    }
    return fetch_chunk<T>(from, row, column);
  }

  // A step of 32 columns. Thread t of a quad has columns 8 t to 8 t + 7 of its rows: the products take them in that
  // order on both sides, so that nothing is exchanged.
  __device__ void add(const Source& x, const Source& w, int row, int k) {
    const int group = threadIdx.x % 32 / 4, column = k + kChunk<T> * (threadIdx.x % 4);
    // Beyond the edge the last row stands for what is not there.
    const uint4 low = chunk(x, min(group, x.rows - 1), column, k + 32);
    uint4 high = make_uint4(0, 0, 0, 0);
    if (x.rows > 8) high = chunk(x, min(group + 8, x.rows - 1), column, k + 32);
    const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const uint4 of_w = chunk(w, min(row + 8 * block + group, w.rows - 1), column, k + 32);
      multiply<T>(v[block], first, of_w.x, of_w.y);
      multiply<T>(v[block], second, of_w.z, of_w.w);
    }
  }
};

// Sums of a tile over this part of the columns, for this thread's numbers: warps' shares added in order.
template <class T>
__device__ inline void decode_sums(float (&sums)[kDecodeNumbers], const Source& x, const Source& w, int row, int part,
                                   int parts, float* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, steps = (x.columns + 31) / 32;
  const int share = part * kDecodeWarps + warp, shares = parts * kDecodeWarps;
  const int first = static_cast<int>(static_cast<int64_t>(steps) * share / shares);
  const int end = static_cast<int>(static_cast<int64_t>(steps) * (share + 1) / shares);
  DecodeSums<T> of_warp;
#pragma unroll 4
  for (int step = first; step < end; ++step) of_warp.add(x, w, row, 32 * step);
#pragma unroll
  for (int block = 0; block < DecodeSums<T>::kBlocks; ++block) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int m = lane / 4 + 8 * (e / 2), n = 8 * block + 2 * (lane % 4) + e % 2;
      shared[warp * kDecodeTile + m * kDecodeColumns + n] = of_warp.v[block][e];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kDecodeNumbers; ++i) {
    sums[i] = 0;
    for (int other = 0; other < kDecodeWarps; ++other) {
      sums[i] += shared[other * kDecodeTile + i * kDecodeThreads + threadIdx.x];
    }
  }
  __syncthreads();
}

// Turns a part's sums into those over all parts, in order, and returns true to the last part to arrive.
__device__ inline bool decode_sum_of_parts(float (&sums)[kDecodeNumbers], float* space, int* counter, int part, int parts,
                                           int* shared) {
  if (parts == 1) return true;
#pragma unroll
  for (int i = 0; i < kDecodeNumbers; ++i) space[part * kDecodeTile + i * kDecodeThreads + threadIdx.x] = sums[i];
  if (!last_to_arrive(counter, parts, shared_address(shared))) return false;
#pragma unroll
  for (int i = 0; i < kDecodeNumbers; ++i) {
    sums[i] = 0;
    for (int p = 0; p < parts; ++p) {
      sums[i] += load_fresh(space + p * kDecodeTile + i * kDecodeThreads + threadIdx.x, true);
    }
  }
  return true;
}

// xa as another program published it, to float32 rows of `pitch` numbers in shared memory, zeros after its ranks.
template <class T>
__device__ inline void load_xa(const DecodeParams& p, int pitch, float* shared) {
  const Layer& layer = p.layer;
  for (int index = threadIdx.x; index < layer.m * pitch; index += kDecodeThreads) {
    const int m = index / pitch, r = index % pitch;
    shared[index] = number<T>(load_fresh(static_cast<const Bits<T>*>(p.xa) + m * layer.r + r, r < layer.r));
  }
  __syncthreads();
}

// Σ xa[m] b[n] of a row of xa in shared memory.
template <class T>
__device__ inline float low_rank_number(const Source& b, int n, const float* xa) {
  float sum = 0;
  for (int rank = 0; rank < b.columns; rank += kChunk<T>) {
    const uint4 of_b = DecodeSums<T>::chunk(b, n, rank, rank + kChunk<T>);
    const uint32_t pairs[4] = {of_b.x, of_b.y, of_b.z, of_b.w};
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      sum += xa[rank + i] * number<T>(static_cast<Bits<T>>(pairs[i / 2] >> 16 * (i % 2)));
    }
  }
  return sum;
}

template <class T>
__device__ inline void decode(const DecodeParams& p) {
  extern __shared__ __align__(128) char dynamic[];
  float* memory = reinterpret_cast<float*>(dynamic);
  const Layer& layer = p.layer;
  const Source x = matrix<T>(p.x, layer.m, layer.k);
  const Source b = adapter<T>(layer, layer.b, layer.n, layer.r);
  const int pitch = (layer.r + kChunk<T> - 1) / kChunk<T> * kChunk<T>;
  static_assert(kDecodeRows * 256 * 4 <= kDecodeBytes, "xa of all ranks");
  const int thin_tiles = (layer.r + kDecodeColumns - 1) / kDecodeColumns;
  const int tiles = thin_tiles + (layer.n + kDecodeColumns - 1) / kDecodeColumns;
  for (int index = blockIdx.x; index < tiles * p.parts; index += gridDim.x) {
    const int tile = index / p.parts, part = index % p.parts;
    const bool thin = tile < thin_tiles;
    const int row = (thin ? tile : tile - thin_tiles) * kDecodeColumns;
    const Source w = thin ? adapter<T>(layer, layer.a, layer.r, layer.k) : matrix<T>(layer.w, layer.n, layer.k);
    float sums[kDecodeNumbers];
    decode_sums<T>(sums, x, w, row, part, p.parts, memory);
    float* space = p.partials + static_cast<int64_t>(tile) * p.parts * kDecodeTile;
    if (!decode_sum_of_parts(sums, space, p.counters + tile, part, p.parts, reinterpret_cast<int*>(memory))) continue;
    if (!thin) {
      wait(p.flag, thin_tiles);
      load_xa<T>(p, pitch, memory);
    }
#pragma unroll
    for (int i = 0; i < kDecodeNumbers; ++i) {
      const int at = i * kDecodeThreads + threadIdx.x, m = at / kDecodeColumns, n = row + at % kDecodeColumns;
      if (m >= layer.m || n >= (thin ? layer.r : layer.n)) continue;
      if (thin) {
        store_number<T>(p.xa, static_cast<int64_t>(m) * layer.r + n, sums[i], false);
      } else {
        const float bias = p.bias ? number<T>(static_cast<const Bits<T>*>(p.bias)[n]) : 0.0f;
        const float y = sums[i] + scaling_of(layer) * low_rank_number<T>(b, n, memory + m * pitch) + bias;
        store_number<T>(p.y, static_cast<int64_t>(m) * layer.n + n, y, false);
      }
    }
    if (thin) {
      publish(p.flag);
    } else {
      leave(p.flag, tiles - 1);
    }
  }
}

}  // namespace lora_kernels

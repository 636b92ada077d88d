// Where the operands of products lie, and how a tile of W comes to shared memory: dense, copied as it lies. A format that has
// to be decoded has its tile and its copies here.

#pragma once

#include "../host/params.h"
#include "streams.cuh"

namespace lora_kernels {

template <class T>
__device__ inline bool in_chunks(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kChunk<T> == 0;
}

// A matrix of the layer's type.
template <class T>
__device__ inline Source matrix(const Rows& t, int rows, int columns) {
  return {t.data, t.stride, rows, columns, sizeof(T) == 4, in_chunks<T>(t.data, t.stride)};
}

// lora_A or lora_B, which may be float32 beside 16-bit elements.
template <class T>
__device__ inline Source adapter(const Layer& layer, const Rows& t, int rows, int columns) {
  const bool is_float = layer.adapters_are_float;
  return {t.data, t.stride, rows, columns, is_float, is_float == (sizeof(T) == 4) && in_chunks<T>(t.data, t.stride)};
}

// W [n, k].
template <class T>
__device__ inline Source weight(const Layer& layer) {
  return matrix<T>(layer.w, layer.n, layer.k);
}

// A step's tile of W as products read it: [columns, depth], or [depth, columns] if kByDepth.
template <class T, class S, bool kByDepth>
using WeightTile = std::conditional_t<kByDepth, DeepTile<T, S::kDepth, S::kColumns>, Tile<T, S::kColumns, S::kDepth>>;

// Copies the tiles of W at a column, in order of depth.
template <class T, class S, bool kByDepth, bool kInChunks>
struct WeightStream
    : Stream<T, WeightTile<T, S, kByDepth>, S::kThreads, StreamMode{.along_rows = kByDepth, .in_chunks = kInChunks}> {
  __device__ WeightStream(const Source& w, int column)
      : WeightStream::Stream(w, kByDepth ? 0 : column, kByDepth ? column : 0) {}
};

// The same for a loop without branches.
template <class T, class S, bool kByDepth>
struct WholeWeightStream : WholeStream<T, WeightTile<T, S, kByDepth>, S::kThreads, kByDepth> {
  __device__ WholeWeightStream(const Source& w, int column)
      : WholeWeightStream::WholeStream(w, kByDepth ? 0 : column, kByDepth ? column : 0) {}
};

}  // namespace lora_kernels

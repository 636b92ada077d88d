// The thin product D(v) f, [rows, ranks], in a launch of its own: the first of the split path, where there are more slices
// of ranks than columns of tiles or programs, and where dx is not wanted.

#pragma once

#include "epilogue.cuh"

namespace lora_kernels {

// A ring of steps 128 bytes deep; every warp has 16 rows and all ranks.
template <class T, int kRanks, bool kByDepth>
struct ThinRing {
  static constexpr int kDepth = 128 / sizeof(T);
  using Left = Tile<T, kThinRows, kDepth>;
  using Thin = std::conditional_t<kByDepth, DeepTile<T, kDepth, kRanks>, Tile<T, kRanks, kDepth>>;
  static constexpr int kStages = kThinStages, kStageBytes = Left::kBytes + Thin::kBytes;
  static_assert(kStages * kStageBytes == thin_bytes(kRanks), "what the host asks for");
};

// sums = D(left) thin for the rows from operands.row on and kRanks ranks; thin is [ranks, depth], or
// [depth, ranks] if kByDepth, and its part that counts is already chosen by its pointer.
template <class T, int kRanks, bool kByDepth, bool kDropout>
__device__ inline void thin_product(ThinSums<kRanks>& sums, const Operands& operands, uint32_t shared) {
  using R = ThinRing<T, kRanks, kByDepth>;
  const Mask mask(operands.layer);
  const int steps = (operands.depth + R::kDepth - 1) / R::kDepth, warp_row = threadIdx.x / 32 * 16;
  const LeftReader<typename R::Left> left(warp_row);
  const RightReader<typename R::Thin, kByDepth> thin(0);
  const auto copy = [&](int step) {
    const uint32_t stage = shared + step % R::kStages * R::kStageBytes;
    copy_tile<T, typename R::Left, kThinThreads>(stage, operands.left, operands.row, R::kDepth * step);
    copy_tile<T, typename R::Thin, kThinThreads>(
        stage + R::Left::kBytes, operands.thin, kByDepth ? R::kDepth * step : 0, kByDepth ? 0 : R::kDepth * step);
  };
  for (int step = 0; step < R::kStages - 1; ++step) {
    if (step < steps) copy(step);
    commit_copies();
  }
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<R::kStages - 2>();
    __syncthreads();
    if (step + R::kStages - 1 < steps) copy(step + R::kStages - 1);
    commit_copies();
    const uint32_t stage = shared + step % R::kStages * R::kStageBytes;
    LeftMask<T> left_mask;
    repeat<R::kDepth / kDeep<T>>([&](auto slice) {
      Left<T> kept;
      left.template read<0>(kept, stage, slice);
      if (kDropout) {
        const int lane = threadIdx.x % 32, column = step * R::kDepth + kDeep<T> * slice;
        left_mask.template keep<slice>(kept, mask, operands.row + warp_row + lane / 4, column, lane % 4);
      }
      repeat<kRanks / 16>([&](auto j) {
        Right<T> f;
        thin.template read<16 * j, slice>(f, stage + R::Left::kBytes);
        multiply_long<T>(sums.v[2 * j], kept, f[0], f[1]);
        multiply_long<T>(sums.v[2 * j + 1], kept, f[2], f[3]);
      });
    });
  }
  wait_for_copies<0>();
  __syncthreads();
}

// out [rows, r] = scale * D(left) thin for the rows of one tile, all ranks, kRanks of them at a time.
template <class T, int kRanks, bool kByDepth, bool kDropout>
__device__ inline void thin_tile(const Operands& operands, float scale, void* out, int r,
                                 uint32_t shared) {
  for (int rank = 0; rank < r; rank += kRanks) {
    const Source thin = kByDepth ? from_column(operands.thin, rank) : from_row(operands.thin, rank);
    const Operands part{operands.layer, operands.left, {}, thin, operands.row, 0, operands.depth};
    ThinSums<kRanks> sums;
    thin_product<T, kRanks, kByDepth, kDropout>(sums, part, shared);
    store_thin<T, kRanks>(sums, scale, out, operands.row + threadIdx.x / 32 * 16, operands.left.rows, rank, r);
  }
}

template <class T, int kRanks, bool kDropout>
__device__ inline void thin(const ThinParams& p) {
  extern __shared__ __align__(128) char memory[];
  const uint32_t shared = shared_address(memory);
  const Layer& layer = p.layer;
  for (int row = blockIdx.x * kThinRows; row < layer.m; row += gridDim.x * kThinRows) {
    if (p.backward) {
      const Operands operands{layer, matrix<T>(p.v, layer.m, layer.n), {}, adapter<T>(layer, layer.b, layer.n, layer.r), row, 0, layer.n};
      const float scale = scaling_of(layer) * keep_scale(layer);
      thin_tile<T, kRanks, true, false>(operands, scale, p.out, layer.r, shared);
    } else {
      const Operands operands{layer, matrix<T>(p.v, layer.m, layer.k), {}, adapter<T>(layer, layer.a, layer.r, layer.k), row, 0, layer.k};
      thin_tile<T, kRanks, false, kDropout>(operands, keep_scale(layer), p.out, layer.r, shared);
    }
  }
}

}  // namespace lora_kernels

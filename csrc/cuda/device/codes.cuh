// W in four bits: decoded to the operands of products where few rows read it, or to memory for kernels of a dense W.
//
// Of each block the sixteen products of a code and the scale are rounded to W's type once, as the definition has it, and kept
// as planes: four registers of their low bytes, four of the high ones. Four codes of a word then select four bytes of a plane
// by three PRMT, and two more put the bytes together: 22 instructions decode eight codes to the very registers that products
// take, since a byte holds the pair of columns that a thread has of them. Columns are 64 for each thread of a quad, so that
// one thread makes the planes of a block of 64.

#pragma once

#include "few_rows.cuh"

namespace lora_kernels {

constexpr int kNestedBlock = 256;  // scales that share a scale of their own

// The scale of a block; of nested ones product and sum are rounded each.
template <bool kNested>
__device__ inline float scale_of(const Codes& codes, int64_t block) {
  if constexpr (!kNested) return __ldg(static_cast<const float*>(codes.absmax) + block);
  const float own = __ldg(codes.nested_code + __ldg(static_cast<const uint8_t*>(codes.absmax) + block));
  return __fadd_rn(__fmul_rn(own, __ldg(codes.nested_absmax + block / kNestedBlock)), __ldg(codes.nested_offset));
}

// What code `at` stands for.
__device__ inline float number_of(const Codes& codes, int64_t at) {
  const uint32_t byte = __ldg(codes.bytes + at / 2);
  return __ldg(codes.code + (at % 2 ? byte & 15 : byte >> 4));
}

// What the codes of a block stand for, by planes of bytes.
template <class T>
struct Planes {
  uint32_t low[4], high[4];

  __device__ void fill(const float (&code)[16], float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = pair_of<T>(__fmul_rn(code[4 * i], scale), __fmul_rn(code[4 * i + 1], scale));
      const uint32_t second = pair_of<T>(__fmul_rn(code[4 * i + 2], scale), __fmul_rn(code[4 * i + 3], scale));
      low[i] = permute(first, second, 0x6420);
      high[i] = permute(first, second, 0x7531);
    }
  }
  // Eight codes as four pairs, in order.
  __device__ void decode(uint32_t (&to)[4], uint32_t word) const {
    const uint32_t within = word & 0x77777777, half = (word >> 1 & 0x44444444) | 0x32103210;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t lows = select(low, within >> 16 * i, half >> 16 * i);
      const uint32_t highs = select(high, within >> 16 * i, half >> 16 * i);
      to[2 * i] = permute(lows, highs, 0x4051);  // the high half of a byte is the first of its two codes
      to[2 * i + 1] = permute(lows, highs, 0x6273);
    }
  }
  // Of each code its byte of a plane: by its low three bits of both halves, of these by the fourth.
  __device__ static uint32_t select(const uint32_t (&plane)[4], uint32_t within, uint32_t half) {
    return permute(permute(plane[0], plane[1], within), permute(plane[2], plane[3], within), half);
  }
};

// W's rows as few_rows takes them.
template <class T, bool kNested>
struct CodedRows {
  static constexpr int kColumns = kCodedColumns, kUnrolled = 1;
  struct Loaded {
    uint4 words[2];
    float scales[2];
    Planes<T> planes;
  };
  struct Place {
    int row, column;
  };
  template <Reach kReach>
  using Piece = std::conditional_t<kReach == Reach::kAny, Place, Loaded>;

  const Codes& codes;
  int n, k;
  bool two_scales;  // whether a piece's halves may lie in different blocks
  float code[16];

  __device__ CodedRows(const Codes& from, const Layer& layer)
      : codes(from), n(layer.n), k(layer.k), two_scales(from.log_block == 5 || layer.k % 64 != 0) {
#pragma unroll
    for (int i = 0; i < 16; ++i) code[i] = __ldg(from.code + i);
  }
  __device__ bool in_chunks() const { return codes.in_chunks; }
  __device__ int rows() const { return n; }

  template <Reach kReach>
  __device__ void load(Place& piece, int row, int column, int) const {
    piece = {row, column};
  }
  // A half beyond the edge has a scale of zero.
  template <Reach kReach>
  __device__ void load(Loaded& piece, int row, int column, int) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int first = column + 32 * i;
      const bool there = kReach == Reach::kInside || first < k;
      const int64_t at = static_cast<int64_t>(row) * k + (there ? first : 0);
      piece.words[i] = __ldg(reinterpret_cast<const uint4*>(codes.bytes + at / 2));
      if (i == 0 || two_scales) {
        const float scale = scale_of<kNested>(codes, at >> codes.log_block);
        piece.scales[i] = there ? scale : 0.0f;
      }
    }
  }

  template <int kBlocks>
  __device__ void prepare(Place (&)[kBlocks], int) const {}
  template <int kBlocks>
  __device__ void prepare(Loaded (&pieces)[kBlocks], int chunk) const {
    if (chunk == 0 || (chunk == 4 && two_scales)) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) pieces[block].planes.fill(code, pieces[block].scales[chunk / 4]);
    }
  }

  __device__ void operands(uint32_t (&to)[4], const Loaded& piece, int chunk) const {
    const uint4 four = piece.words[chunk / 4];
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
    piece.planes.decode(to, words[chunk % 4]);
  }
  __device__ void operands(uint32_t (&to)[4], const Place& piece, int chunk) const {
    const int first = piece.column + 8 * chunk;
    __syncwarp();  // one piece after the other: all at once take more registers than there are
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = pair_of<T>(element(piece.row, first + 2 * i), element(piece.row, first + 2 * i + 1));
  }
  // One of W, where rows may begin inside a block and inside a byte; zero beyond the edge.
  __device__ float element(int row, int column) const {
    const int64_t at = static_cast<int64_t>(row) * k + min(column, k - 1);
    const float product = __fmul_rn(number_of(codes, at), scale_of<kNested>(codes, at >> codes.log_block));
    return column < k ? product : 0.0f;
  }
};

template <class T, bool kNested>
__device__ inline void few_rows(const CodedFewRowsParams& p) {
  few_rows<T>(p.few_rows, [&] { return CodedRows<T, kNested>(p.codes, p.few_rows.layer); });
}

// ---- to memory ----

// Eight elements a thread, which lie in one block.
template <class T, bool kNested>
__device__ inline void decode(const DecodeParams& p) {
  const int64_t first = 8 * (static_cast<int64_t>(blockIdx.x) * kDecodeThreads + threadIdx.x);
  if (first >= p.count) return;
  const float scale = scale_of<kNested>(p.codes, first >> p.codes.log_block);
  float numbers[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) numbers[i] = __fmul_rn(number_of(p.codes, min(first + i, p.count - 1)), scale);
  if (first + 8 > p.count) {
    for (int i = 0; first + i < p.count; ++i) store_number<T>(p.w, first + i, numbers[i], false);
    return;
  }
  uint32_t* to = static_cast<uint32_t*>(p.w) + first * sizeof(T) / 4;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      store_words(to + i, make_uint4(__float_as_uint(numbers[i]), __float_as_uint(numbers[i + 1]),
                                     __float_as_uint(numbers[i + 2]), __float_as_uint(numbers[i + 3])));
    }
  } else {
    store_words(to, make_uint4(pair_of<T>(numbers[0], numbers[1]), pair_of<T>(numbers[2], numbers[3]),
                               pair_of<T>(numbers[4], numbers[5]), pair_of<T>(numbers[6], numbers[7])));
  }
}

}  // namespace lora_kernels

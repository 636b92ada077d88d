// y and xa for few rows, at most 16, in one launch. What takes the time is reading W.
//
// A tile is 32 rows of W, or of A, for all rows of x; those of A come first. A tile's columns, K, may be split in parts, and
// each part has a number. A program takes numbers until there are none. What it does for one:
//
// 1. Each of its eight warps sums x wT over a share of the part's columns: 16-byte loads go straight to the operands of matrix
//    products, or to what decodes these. The warps' sums are added in order, through shared memory.
// 2. If there are several parts, it stores the sums and counts itself in. All but the last to arrive are done; the last one
//    adds the parts in the order of K.
// 3. A tile of A stores xa and publishes it by the call's one flag.
// 4. A tile of W waits until all of xa is there, adds scaling * xa BT and the bias, stores y and counts itself out.
//
// How W is stored is a type: DenseRows here, CodedRows in codes.cuh. One has kColumns, which a thread takes of a row in a step;
// pieces, what is loaded of a row for these; and the operands of a piece's chunks.

#pragma once

#include "epilogue.cuh"
#include "order.cuh"

namespace lora_kernels {

// What is known of the columns of a step.
enum class Reach {
  kInside,  // chunks, none beyond the last column
  kEdge,    // chunks, of which some lie beyond it as a whole
  kAny,     // rows may lie anywhere
};

// One chunk of a row; by elements where rows don't allow more or the matrix ends before `end`, which is the same for
// all lanes.
template <class T>
__device__ inline uint4 few_rows_chunk(const Source& from, int row, int column, int end) {
  if (from.in_chunks && end <= from.columns) {
    return __ldg(reinterpret_cast<const uint4*>(static_cast<const Bits<T>*>(from.data) + row * from.stride + column));
  }
  return fetch_chunk<T>(from, row, column);
}
// The same where more is known: no branch keeps a step's loads apart.
template <class T, Reach kReach>
__device__ inline uint4 few_rows_chunk(const Source& from, int row, int column, int end) {
  if constexpr (kReach == Reach::kAny) return few_rows_chunk<T>(from, row, column, end);
  const bool there = kReach == Reach::kInside || column < from.columns;
  const Bits<T>* at = static_cast<const Bits<T>*>(from.data) + row * from.stride + (there ? column : 0);
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(at));
  return make_uint4(there ? v.x : 0, there ? v.y : 0, there ? v.z : 0, there ? v.w : 0);
}

// W, or A, as it lies: a thread's piece of a row is one chunk, of kAhead steps at once.
template <class T, int kAhead = 4>
struct DenseRows {
  static constexpr int kColumns = kChunk<T>, kUnrolled = kAhead;
  template <Reach kReach>
  using Piece = uint4;
  Source source;

  __device__ bool in_chunks() const { return source.in_chunks; }
  __device__ int rows() const { return source.rows; }
  template <Reach kReach>
  __device__ void load(uint4& piece, int row, int column, int end) const {
    piece = few_rows_chunk<T, kReach>(source, row, column, end);
  }
  template <int kBlocks>
  __device__ void prepare(uint4 (&)[kBlocks], int) const {}
  __device__ void operands(uint32_t (&to)[4], const uint4& piece, int) const {
    to[0] = piece.x, to[1] = piece.y, to[2] = piece.z, to[3] = piece.w;
    round_operand<T>(to);
  }
};

// Columns of a step, a piece of a row for each thread of a quad.
template <class Rows>
constexpr int kFewRowsStep = 4 * Rows::kColumns;

// Where sum (m, n) of a tile lies in shared memory: all that the threads of a warp store at once in different banks.
__device__ inline int few_rows_place(int m, int n) { return m * kFewRowsColumns + (n ^ (m % 2 + m % 8 / 2 * 8)); }

// A warp's share of x WT: float32 sums of 16 rows by kFewRowsColumns rows of W.
template <class T>
struct FewRowsSums {
  static constexpr int kBlocks = kFewRowsColumns / 8;
  float v[kBlocks][4] = {};

  // Adds steps `first` to `end` of rows of W from `row` on.
  template <class Rows>
  __device__ void add(const Source& x, const Rows& w, int row, int first, int end) {
    if (!x.in_chunks || !w.in_chunks()) {
#pragma unroll 1
      for (int step = first; step < end; ++step) add_step<Reach::kAny>(x, w, row, step);
      return;
    }
    const int inside = min(end, x.columns / kFewRowsStep<Rows>);
#pragma unroll (Rows::kUnrolled)
    for (int step = first; step < inside; ++step) add_step<Reach::kInside>(x, w, row, step);
#pragma unroll 1
    for (int step = max(first, inside); step < end; ++step) add_step<Reach::kEdge>(x, w, row, step);
  }

  // The products take a thread's columns in the order in which its chunks have them, on both sides, so that nothing is
  // exchanged. All pieces of W come first: memory is what a step waits for.
  template <Reach kReach, class Rows>
  __device__ void add_step(const Source& x, const Rows& w, int row, int step) {
    constexpr int kChunks = Rows::kColumns / kChunk<T>;
    const int group = threadIdx.x % 32 / 4, first = kFewRowsStep<Rows> * step, end = first + kFewRowsStep<Rows>;
    const int column = first + Rows::kColumns * (threadIdx.x % 4);
    typename Rows::template Piece<kReach> pieces[kBlocks];
    // Beyond the edge the last row stands for what is not there.
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      w.template load<kReach>(pieces[block], min(row + 8 * block + group, w.rows() - 1), column, end);
    }
#pragma unroll (kReach == Reach::kAny ? 1 : kChunks)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int at = column + kChunk<T> * chunk;
      const uint4 low = few_rows_chunk<T, kReach>(x, min(group, x.rows - 1), at, end);
      uint4 high = make_uint4(0, 0, 0, 0);
      if (x.rows > 8) high = few_rows_chunk<T, kReach>(x, min(group + 8, x.rows - 1), at, end);
      uint32_t left[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
      round_operand<T>(left[0]);
      round_operand<T>(left[1]);
      w.prepare(pieces, chunk);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        uint32_t parts[4];
        w.operands(parts, pieces[block], chunk);
        multiply<T>(v[block], left[0], parts[0], parts[1]);
        multiply<T>(v[block], left[1], parts[2], parts[3]);
      }
    }
  }

  __device__ void store(float* tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int e = 0; e < 4; ++e) tile[few_rows_place(lane / 4 + 8 * (e / 2), 8 * block + 2 * (lane % 4) + e % 2)] = v[block][e];
    }
  }
};

// By plain float32 products: every thread sums all rows of x by its quad's rows of W, over its own columns.
template <>
struct FewRowsSums<float> {
  static constexpr int kBlocks = kFewRowsColumns / 8, kStep = kFewRowsStep<DenseRows<float>>;
  float v[kFewRows][kBlocks] = {};

  static __device__ float4 numbers(const Source& from, int row, int column, int end) {
    const uint4 bits = few_rows_chunk<float>(from, row, column, end);
    return make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w));
  }

  // W is read a step ahead: branches over the rows of x keep the compiler from it.
  __device__ void add(const Source& x, const DenseRows<float>& rows, int row, int first, int end) {
    const Source& w = rows.source;
    float4 next[kBlocks];
    if (first < end) read(next, w, row, first);
    for (int step = first; step < end; ++step) {
      float4 of_w[kBlocks];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) of_w[block] = next[block];
      if (step + 1 < end) read(next, w, row, step + 1);
      add_step(x, of_w, step);
    }
  }

  static __device__ void read(float4 (&to)[kBlocks], const Source& w, int row, int step) {
    const int group = threadIdx.x % 32 / 4, k = kStep * step, column = k + 4 * (threadIdx.x % 4);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      to[block] = numbers(w, min(row + 8 * block + group, w.rows - 1), column, k + kStep);
    }
  }

  __device__ void add_step(const Source& x, const float4 (&of_w)[kBlocks], int step) {
    const int k = kStep * step, column = k + 4 * (threadIdx.x % 4);
#pragma unroll
    for (int m = 0; m < kFewRows; ++m) {
      // Four rows at a time, the last one for those that are not there.
      if (m >= (x.rows + 3) / 4 * 4) break;
      const float4 of_x = numbers(x, min(m, x.rows - 1), column, k + kStep);
      // Four products are summed by themselves, as in multiply_long.
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) v[m][block] += plus_product(0, of_x, of_w[block]);
    }
  }

  // Of each bit of a thread's place in its quad: it keeps half of the rows, adds its neighbour's share of them and
  // gives the others away. What it has at the end are rows whose bits 1 and 2 are its place.
  __device__ void store(float* tile) {
    const int lane = threadIdx.x % 32;
    add_shares<2>(lane % 2);
    add_shares<4>(lane / 2 % 2);
#pragma unroll
    for (int i = 0; i < kFewRows; ++i) {
      if (i & 6) continue;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) tile[few_rows_place(i + lane % 4 * 2, 8 * block + lane / 4)] = v[i][block];
    }
  }
  // Rows without kBit become the sums of those that have this thread's `bit` there, over it and its neighbour.
  template <int kBit>
  __device__ void add_shares(bool bit) {
#pragma unroll
    for (int m = 0; m < kFewRows; ++m) {
      if (m & 6 & (2 * kBit - 1)) continue;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const float kept = bit ? v[m | kBit][block] : v[m][block], given = bit ? v[m][block] : v[m | kBit][block];
        v[m][block] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, kBit / 2);
      }
    }
  }
};

// Sums of a tile over this part of the columns, for this thread's numbers: warps' shares added in order.
template <class T, class Rows>
__device__ inline void few_rows_sums(float (&sums)[kFewRowsNumbers], const Source& x, const Rows& w, int row, int part,
                                   int parts, float* shared) {
  const int warp = threadIdx.x / 32, steps = (x.columns + kFewRowsStep<Rows> - 1) / kFewRowsStep<Rows>;
  const int share = part * kFewRowsWarps + warp, shares = parts * kFewRowsWarps;
  const int first = static_cast<int>(static_cast<int64_t>(steps) * share / shares);
  const int end = static_cast<int>(static_cast<int64_t>(steps) * (share + 1) / shares);
  FewRowsSums<T> of_warp;
  of_warp.add(x, w, row, first, end);
  of_warp.store(shared + warp * kFewRowsTile);
  __syncthreads();
  const uint32_t thread = kept_in_register(threadIdx.x);  // anew: what follows from it is not kept over the loop above
#pragma unroll
  for (int i = 0; i < kFewRowsNumbers; ++i) {
    sums[i] = 0;
    const uint32_t at = i * kFewRowsThreads + thread;
    const int place = few_rows_place(at / kFewRowsColumns, at % kFewRowsColumns);
    for (int other = 0; other < kFewRowsWarps; ++other) sums[i] += shared[other * kFewRowsTile + place];
  }
  __syncthreads();
}

// Turns a part's sums into those over all parts, in order, and returns true to the last part to arrive.
__device__ inline bool few_rows_sum_of_parts(float (&sums)[kFewRowsNumbers], float* space, int* counter, int part, int parts,
                                           int* shared) {
  if (parts == 1) return true;
#pragma unroll
  for (int i = 0; i < kFewRowsNumbers; ++i) space[part * kFewRowsTile + i * kFewRowsThreads + threadIdx.x] = sums[i];
  if (!last_to_arrive(counter, parts, shared_address(shared))) return false;
#pragma unroll
  for (int i = 0; i < kFewRowsNumbers; ++i) {
    sums[i] = 0;
    for (int p = 0; p < parts; ++p) {
      sums[i] += load_fresh(space + p * kFewRowsTile + i * kFewRowsThreads + threadIdx.x, true);
    }
  }
  return true;
}

// xa as another program published it, to float32 rows of `pitch` numbers in shared memory, zeros after its ranks.
template <class T>
__device__ inline void load_xa(const FewRowsParams& p, int pitch, float* shared) {
  const Layer& layer = p.layer;
  for (int index = threadIdx.x; index < layer.m * pitch; index += kFewRowsThreads) {
    const int m = index / pitch, r = index % pitch;
    shared[index] = number<T>(load_fresh(static_cast<const Bits<T>*>(p.xa) + m * layer.r + r, r < layer.r));
  }
  __syncthreads();
}

// Σ xa[m] b[n] of a row of xa in shared memory. A chunk's products are summed by themselves, as in multiply_long.
template <class T>
__device__ inline float low_rank_number(const Source& b, int n, const float* xa) {
  float sum = 0;
  for (int rank = 0; rank < b.columns; rank += kChunk<T>) {
    const uint4 of_b = few_rows_chunk<T>(b, n, rank, rank + kChunk<T>);
    const uint32_t words[4] = {of_b.x, of_b.y, of_b.z, of_b.w};
    float of_chunk = 0;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      if constexpr (sizeof(T) == 4) {
        of_chunk += xa[rank + i] * __uint_as_float(words[i]);
      } else {
        of_chunk += xa[rank + i] * number<T>(static_cast<Bits<T>>(words[i / 2] >> 16 * (i % 2)));
      }
    }
    sum += of_chunk;
  }
  return sum;
}

// weights: returns W's rows, anew for each tile, so that nothing of them is kept over those of A.
template <class T, class F>
__device__ inline void few_rows(const FewRowsParams& p, F weights) {
  extern __shared__ __align__(128) char dynamic[];
  float* memory = reinterpret_cast<float*>(dynamic);
  const Layer& layer = p.layer;
  const Source x = matrix<T>(p.x, layer.m, layer.k);
  const Source b = adapter<T>(layer, layer.b, layer.n, layer.r);
  const int pitch = (layer.r + kChunk<T> - 1) / kChunk<T> * kChunk<T>;
  static_assert(kFewRows * 256 * 4 <= kFewRowsBytes, "xa of all ranks");
  const int shrink_tiles = (layer.r + kFewRowsColumns - 1) / kFewRowsColumns;
  const int tiles = shrink_tiles + (layer.n + kFewRowsColumns - 1) / kFewRowsColumns;
  Numbers numbers{p.ticket, shared_address(memory) + kFewRowsBytes};
  numbers.take();
  for (int index; (index = numbers.next()) < p.ticket.count;) {
    numbers.take();
    const int tile = index / p.parts, part = index % p.parts;
    const bool shrink = tile < shrink_tiles;
    const int row = (shrink ? tile : tile - shrink_tiles) * kFewRowsColumns;
    float sums[kFewRowsNumbers];
    if constexpr (std::is_same_v<decltype(weights()), DenseRows<T>>) {
      const DenseRows<T> w{shrink ? adapter<T>(layer, layer.a, layer.r, layer.k) : weights().source};
      few_rows_sums<T>(sums, x, w, row, part, p.parts, memory);
    } else if (shrink) {
      few_rows_sums<T>(sums, x, DenseRows<T, 2>{adapter<T>(layer, layer.a, layer.r, layer.k)}, row, part, p.parts, memory);
    } else {
      few_rows_sums<T>(sums, x, weights(), row, part, p.parts, memory);
    }
    float* space = p.partials + static_cast<int64_t>(tile) * p.parts * kFewRowsTile;
    if (!few_rows_sum_of_parts(sums, space, p.counters + tile, part, p.parts, reinterpret_cast<int*>(memory))) continue;
    if (!shrink) {
      wait(p.flag, shrink_tiles);
      load_xa<T>(p, pitch, memory);
    }
    const uint32_t thread = kept_in_register(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kFewRowsNumbers; ++i) {
      const uint32_t at = i * kFewRowsThreads + thread;
      const int m = at / kFewRowsColumns, n = row + at % kFewRowsColumns;
      if (m >= layer.m || n >= (shrink ? layer.r : layer.n)) continue;
      if (shrink) {
        store_number<T>(p.xa, static_cast<int64_t>(m) * layer.r + n, sums[i], false);
      } else {
        const float bias = p.bias ? number<T>(static_cast<const Bits<T>*>(p.bias)[n]) : 0.0f;
        const float y = sums[i] + scaling_of(layer) * low_rank_number<T>(b, n, memory + m * pitch) + bias;
        store_number<T>(p.y, static_cast<int64_t>(m) * layer.n + n, y, false);
      }
    }
    if (shrink) {
      publish(p.flag);
    } else {
      leave(p.flag, tiles - 1);
    }
  }
}

template <class T>
__device__ inline void few_rows(const FewRowsParams& p) {
  few_rows<T>(p, [&] { return DenseRows<T>{weight<T>(p.layer)}; });
}

}  // namespace lora_kernels

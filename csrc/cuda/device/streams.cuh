// Copies of a product's steps: equal tiles along one dimension of a matrix.

#pragma once

#include "tiles.cuh"

namespace lora_kernels {

struct StreamMode {
  bool along_rows;  // or columns
  bool in_chunks;   // what `Source::in_chunks` says, known when compiled
};

// Copies equal tiles along one dimension: addresses are computed once and advanced.
template <class T, class Tile, int kThreads, StreamMode kMode>
class Stream {
 public:
  static constexpr int kCopies = Tile::kRows * Tile::kChunks / kThreads;
  static_assert(Tile::kRows * Tile::kChunks % kThreads == 0 && kThreads % (8 * Tile::kChunks) == 0,
                "copies of a thread lie in one column of chunks, at rows with one permutation");

  // Starts at (row, column).
  __device__ Stream(const Source& from, int row, int column)
      : from_(from), row_(row), column_(column), first_(kept_in_register(Tile::offset(own_row(), own_chunk()))) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      // Beyond the edge the last row stands for what is not there.
      const int r = min(row + own_row() + i * kRowStep, from.rows - 1);
      pointers_[i] = static_cast<const Bits<T>*>(from.data) + r * from.stride + column + kChunk<T> * own_chunk();
    }
  }

  // Copies the next tile.
  __device__ void copy(uint32_t to) {
    const bool inside = kAlongRows ? row_ + Tile::kRows <= from_.rows && column_ + Tile::kColumns <= from_.columns
                                   : column_ + Tile::kColumns <= from_.columns;
    if (!kInChunks) {
      copy_tile<T, Tile, kThreads, CopyMode{.rolled = sizeof(T) == 4}>(to, from_, row_, column_);
    } else if (inside) {
      repeat<kCopies>([&](auto i) { copy_async<i * kThreads * 16>(to + first_, pointers_[i]); });
    } else {
      const int columns = min(max(from_.columns - column_ - kChunk<T> * own_chunk(), 0), kChunk<T>);
      repeat<kCopies>([&](auto i) {
        const bool there = columns > 0 && (!kAlongRows || row_ + own_row() + i * kRowStep < from_.rows);
        copy_async<i * kThreads * 16>(to + first_, there ? pointers_[i] : from_.data, there ? static_cast<int>(sizeof(T)) * columns : 0);
      });
    }
    const int64_t step = kAlongRows ? Tile::kRows * from_.stride : Tile::kColumns;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) pointers_[i] += step;
    (kAlongRows ? row_ : column_) += kAlongRows ? Tile::kRows : Tile::kColumns;
  }

 private:
  static constexpr bool kAlongRows = kMode.along_rows, kInChunks = kMode.in_chunks;
  static constexpr int kRowStep = kThreads / Tile::kChunks;
  __device__ static int own_row() { return threadIdx.x / Tile::kChunks; }
  __device__ static int own_chunk() { return threadIdx.x % Tile::kChunks; }

  Source from_;
  int row_, column_, first_;
  const Bits<T>* pointers_[kCopies];
};

// The same of rows that chunks fill: a chunk is there as a whole, or it isn't. Copies are chosen by predicates, so that a
// loop has no branch, and beyond the matrix, after the last step too, they are of zeros. Addresses of a step follow from
// the thread's first one: short of registers a thread keeps no others.
template <class T, class Tile, int kThreads, bool kAlongRows>
class WholeStream {
 public:
  static constexpr int kCopies = Tile::kRows * Tile::kChunks / kThreads;
  static_assert(Tile::kRows * Tile::kChunks % kThreads == 0 && kThreads % (8 * Tile::kChunks) == 0,
                "copies of a thread lie in one column of chunks, at rows with one permutation");

  // Starts at (row, column).
  __device__ WholeStream(const Source& from, int row, int column) : row_step_(kRowStep * from.stride), stride_(from.stride) {
    const int thread = kept_in_register(threadIdx.x), own_row = thread / Tile::kChunks, own_chunk = thread % Tile::kChunks;
    const int own_column = column + kChunk<T> * own_chunk;
    first_ = kept_in_register(Tile::offset(own_row, own_chunk));
    next_ = static_cast<const Bits<T>*>(from.data) + (row + own_row) * from.stride + own_column;
    rows_left_ = from.rows - row - own_row;
    columns_left_ = from.columns - own_column;
    if (kAlongRows && columns_left_ <= 0) rows_left_ = 0;
  }

  // Copies the next tile.
  __device__ void copy(uint32_t to) {
    const Bits<T>* from = next_;
    repeat<kCopies>([&](auto i) {
      copy_async<i * kThreads * 16>(to + first_, from, i * kRowStep < rows_left_ && (kAlongRows || columns_left_ > 0) ? 16 : 0);
      from += row_step_;
    });
    next_ += kAlongRows ? Tile::kRows * stride_ : Tile::kColumns;
    (kAlongRows ? rows_left_ : columns_left_) -= kAlongRows ? Tile::kRows : Tile::kColumns;
  }

 private:
  static constexpr int kRowStep = kThreads / Tile::kChunks;

  const Bits<T>* next_;
  int64_t row_step_, stride_;
  int first_, rows_left_, columns_left_;  // from the thread's first chunk on
};

}  // namespace lora_kernels

// What the layer needs beside GEMMs, in versions of one source: AMX, AVX512 with and without products
// of bfloat16, AVX2, portable.
//
// Sums are float32. Where the processor multiplies pairs of bfloat16, products of bfloat16 tensors
// take such pairs; elsewhere they take float32 numbers. Either is a unit of 32 bits, and `deep` is
// how many numbers a unit holds along the dimension that a product sums over.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

// Compilers from GCC 11 and Clang 11 on know the matrix unit.
#if defined(__x86_64__) && defined(__linux__) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#define LORA_HAS_TILES 1
#else
#define LORA_HAS_TILES 0
#endif

namespace lora_kernels {

struct Bf16 {
  uint16_t bits;
};

// Units are numbers or pairs; what holds either is of this type.
typedef uint32_t Unit;

constexpr int64_t kLanes = 16;         // ranks are padded to a multiple
constexpr int64_t kColumnBlock = 64;   // columns of a sum over rows, a multiple of every vector

// Cache-aligned memory of a call; malloc's own alignment is much cheaper than an aligned one.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(new char[sizeof(T) * static_cast<size_t>(count) + kAlignment]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  T* get() const { return data_; }

 private:
  static constexpr uintptr_t kAlignment = 64;
  std::unique_ptr<char[]> memory_;
  T* data_;
};

// Rows of float32 or bfloat16 numbers with unit column stride; `stride` counts elements.
struct Matrix {
  void* data;
  int64_t stride, rows, columns;
  bool is_bf16;
};

// W [rows, columns] as codes that share scales, as lora_kernels/operands defines it (codebook.py, scaled.py).
struct Codes {
  enum Kind { kFourBits, kInt8, kFloat8 } kind;
  const uint8_t* data;
  int64_t rows, columns;
  int64_t stride;  // bytes between rows of codes of eight bits; those of four bits lie without a gap
  int64_t block_rows, block_columns;  // that share a scale; of four bits block_columns codes, wherever rows end
  const float* scales;
  const float* numbers;  // the sixteen that four bits stand for
  // A nested scale b is rn(rn(nested_numbers[nested[b]] * scales[b / kNestedBlock]) + offset).
  const uint8_t* nested;
  const float* nested_numbers;
  float offset;
  bool rounds_to_bf16;  // W is of bfloat16, in whichever type it is written
};

constexpr int64_t kNestedBlock = 256;

// The mask of a matrix [*, columns]: element (m, k) stays iff lane k % 8 of Philox counter
// m * ceil(columns / 8) + k / 8 is at least the threshold. Threshold 0: everything stays. m is the row, or rows[row].
struct Mask {
  int64_t columns = 0;
  uint64_t seed = 0;
  uint32_t threshold = 0;
  const int64_t* rows = nullptr;
};

// The least multiple of step that is not below value.
inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// A factor of a product as its units: [steps, pitch], a step being a unit of the summed dimension,
// pitch the other dimension's width padded with zeros to a multiple of kLanes. Zeros follow the last
// step, to a multiple of kLanes.
struct Panel {
  int64_t steps, width, pitch;
  Buffer<Unit> units;
  Panel(int64_t steps, int64_t width)
      : steps(steps), width(width), pitch(round_up(width, kLanes)), units(round_up(steps, kLanes) * pitch) {
    std::fill(units.get() + steps * pitch, units.get() + round_up(steps, kLanes) * pitch, Unit{0});
  }
};

// A version of the kernels for one instruction set.
struct Kernels {
  const char* name;
  bool has_tiles;  // made for a matrix unit
  bool has_pairs;  // multiplies pairs of bfloat16
  // Panels of a product that sums over m's rows, or over its columns.
  Panel (*panel_over_rows)(Matrix m);
  Panel (*panel_over_columns)(Matrix m);
  // q[i, r] = factor * sum over l of D(v)[i, l] f[l, r] for rows [begin, end); q is [., f.pitch],
  // zero beyond f.width.
  void (*rows_product)(
      Matrix v, const Panel& f, float factor, float* q, Mask mask, int64_t begin, int64_t end);
  // y[i, c] += sum over r of q[i, r] f[r, c] for rows [begin, end) of y.
  void (*add_low_rank)(
      Matrix y, const Panel& f, const float* q, int64_t q_stride, int64_t begin, int64_t end);
  // dx += D(q f) and sums[r, c] = sum over i of q[i, r] D(x)[i, c], float32 [q_stride, pitch], for
  // columns [begin, end), begin a multiple of kColumnBlock. Rows are summed in order, whoever
  // computes them. dx may be absent (null data), or x and sums (null).
  void (*column_pass)(
      Matrix dx, Matrix x, const Panel& f, const float* q, int64_t q_stride, float* sums,
      int64_t pitch, Mask mask, int64_t begin, int64_t end);
  // y[i, n] = x[i] . w[n] + bias[n] for rows [begin, end) of w; bias [1, N] may be absent.
  void (*few_rows)(Matrix x, Matrix w, Matrix bias, Matrix y, int64_t begin, int64_t end);
  // Writes W[row + i, column + j] to out[i, j], which is float32, or bfloat16 as W.
  void (*decode)(const Codes& w, int64_t row, int64_t column, Matrix out);
  // few_rows with a W that is decoded on the way; x, bias and y are of one type, as decode's out.
  void (*few_rows_of_codes)(Matrix x, const Codes& w, Matrix bias, Matrix y, int64_t begin, int64_t end);
  // sums[r, c] = sum over n of q[n, r] W[n, c], as column_pass has them; W is decoded as bfloat16 or float32.
  void (*column_sums_of_codes)(
      const Codes& w, const float* q, int64_t q_stride, float* sums, int64_t pitch, bool is_bf16, int64_t begin,
      int64_t end);
  // out[i] = the sum of v[i]'s squares, for rows [begin, end).
  void (*row_squares)(Matrix v, float* out, int64_t begin, int64_t end);
  // y = gain * v + base + bias for rows [begin, end), gain and bias a number a column, to whole lanes;
  // base may be absent or y, bias may be null.
  void (*rescale)(
      Matrix v, const float* gain, Matrix base, const float* bias, Matrix y, int64_t begin, int64_t end);
  // to = factor * v where v stays, or that added to it where `adds`, for rows [begin, end); v's first row
  // is the mask's first_row.
  void (*add_kept)(
      Matrix v, float factor, Mask mask, int64_t first_row, Matrix to, bool adds, int64_t begin, int64_t end);
  // dz = gain * dy and sums[c] += sum over i of dy[i, c] u[i, c] for columns [begin, end), begin a multiple
  // of kColumnBlock; u or dz may be absent. sums are padded to whole blocks of columns.
  void (*gain_pass)(
      Matrix dy, const float* gain, Matrix u, Matrix dz, float* sums, int64_t begin, int64_t end);
  // Writes a byte a counter, its bit j set iff lane j stays.
  void (*keep_bits)(uint64_t counter, int64_t count, uint64_t seed, uint32_t threshold, uint8_t* out);
};

// The version for the processor that this runs on; LORA_KERNELS_TEST_ISA names a lower one, for tests.
const Kernels& kernels();

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#if LORA_HAS_TILES
extern const Kernels amx_kernels;
#endif
#endif

}  // namespace lora_kernels

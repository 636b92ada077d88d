// What crosses the border between host and device: plain numbers and pointers, no headers of CUDA's.

#pragma once

#include <cstdint>

namespace lora_kernels {

enum class Type : int { kBf16, kHalf, kFloat, kTf32 };  // kTf32: float32 in memory

// Rows of a tensor with unit column stride; the stride counts elements.
struct Rows {
  void* data;
  int64_t stride;
};

// One call of y = x WT + bias + scaling * xa BT, xa = D(x) AT, and its gradients.
struct Layer {
  int m, n, k, r;
  Rows w, a, b;             // [n, k], [r, k], [n, r]
  int adapters_are_float;   // a and b are float32 beside a 16-bit x
  float scaling;
  const float* scaling_pointer;  // where it lies in memory; null: the number above
  const int64_t* seed;           // null: no dropout
  uint32_t threshold;            // of 65536
  uint32_t lower_bits, either;   // its lower 15 bits in both halves; ones where it has no other, else zero
};

// How the tiles of a large product are laid out: panels of rows by columns of tiles.
struct Grid {
  int panels, columns;
};

// Which tiles make the shrink, a slice of ranks of a row panel each: those of the first `xa_columns` columns of the
// large one, beside it, or `alone` tiles before all others.
struct Shrink {
  int slices;               // of ranks; 0: nobody needs it
  int xa_columns, alone;    // one of both is 0
};

// Dropout's bits for the tiles that make xa, drawn before these: for each 16 rows and kWordColumns columns of x, one after
// the other, 32 words for the lanes of a warp.
struct PackedMask {
  uint32_t* words;
  int draws, share;         // of a row panel: shares, and how many times kDrawnColumns each has; no draws: no bits
};

// What programs take the numbers of their tiles from; see Numbers in order.cuh.
struct Ticket {
  int* next;                // zero before and after
  int count, last;          // of numbers; the last one that is taken: every program finds once that there are no more
};

struct ForwardParams {
  Layer layer;
  Grid grid;
  PackedMask mask;
  Rows x;                   // [m, k]
  void *bias, *y, *xa;      // [n] or null, [m, n], [m, r]; contiguous
  int* flags;               // one a row panel, zero before and after
  Shrink shrink;            // xa's
  Ticket ticket;
};

// How the tiles of backward are numbered: kinds one after the other, each from the end of the one before.
struct Kinds {
  int dxa, db, da, all;             // ends
  int parts, slabs;                 // segments of rows; slices of ranks
  int db_blocks, da_blocks;         // tiles of a segment's sums
};

// Where tiles of dA leave dropout's mask to those of dx: for each kSumColumns columns of x so many rows, a bit an
// element. Null: nothing is left.
struct DrawnMask {
  uint8_t* bits;
  int rows;
};

struct BackwardParams {
  Layer layer;
  Grid grid;
  Kinds kinds;
  Rows dy, x;               // [m, n], [m, k]
  const void* xa;           // [m, r]
  void *dxa, *dx, *da, *db, *dbias;  // contiguous; null: not wanted (dxa: not needed)
  int adapter_gradients_are_float;
  DrawnMask mask;
  float* partials;          // [blocks, segments, ranks + 1, columns] if there are several segments
  int *counters, *flags;    // one a block of sums, one a row panel; zero before and after
  int segment;              // rows that a tile of da or db sums
  Shrink shrink;            // dxa's
  float* units;             // of float16's dxa, for each row panel one a slice; else null
  Ticket ticket;
};

// Where a matrix lies that copies take boxes of, as sm_90's hardware has it encoded.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

// What a map says: a matrix of 16-bit elements, and its boxes' rows and columns: as many of each.
struct Boxes {
  void* data;
  int64_t rows, columns, stride;
  int box, is_half;
};

// Results whose rows aren't multiples of 16 bytes are stored without boxes; another's map stands for theirs.
struct HopperForwardParams {
  TensorMap x_map, w_map, y_map;
  int stores_boxes;
  ForwardParams forward;
};

struct HopperBackwardParams {
  TensorMap dy_map, w_map, x_map, dx_map;  // x's is dy's where da isn't wanted
  int stores_boxes;
  BackwardParams backward;
};

struct FewRowsParams {
  Layer layer;              // at most 16 rows, no dropout
  Rows x;                   // [m, k]
  void *bias, *y, *xa;      // as in forward
  float* partials;          // [tiles, parts, 16, columns] if there are several parts
  int *counters, *flag;     // one a tile, one in all; zero before and after
  int parts;                // of the columns of x and W that programs sum by themselves
  Ticket ticket;
};

// W in four bits: two codes a byte, the first of them in its high half, row after row without a gap. W[i] is the number of
// code i by the scale of block i / 2^log_block, rounded once more to the layer's type (lora_kernels/operands/codebook.py).
struct Codes {
  const uint8_t* bytes;
  const float* code;        // the sixteen numbers
  const void* absmax;       // scales, float32; or the bytes that stand for them where they are nested
  const float *nested_code, *nested_absmax, *nested_offset;
  int log_block;
  int in_chunks;            // whether rows are whole pieces of 16 bytes
};

struct CodedFewRowsParams {
  FewRowsParams few_rows;   // whose W is not there
  Codes codes;
};

struct DecodeParams {
  Codes codes;
  void* w;                  // [count], in the layer's type
  int64_t count;
};

}  // namespace lora_kernels

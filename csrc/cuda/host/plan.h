// Which kernel serves a call, on which grid: a pure function of the call and the device.

#pragma once

#include <string>
#include <vector>

#include "params.h"

namespace lora_kernels {

// What a plan depends on of a GPU.
struct Device {
  int arch;            // compute capability 9.0 is 90
  int multiprocessors;
  int shared_bytes;    // a program may have at most
  bool sm90a;          // whether kernels for sm_90a run on it

  // Of compute capability, multiprocessors and bytes of shared memory: a GPU that has all kernels.
  static Device of(const std::vector<int64_t>& numbers);
};

// W itself, or its codes of four bits, with float32 scales or with nested ones.
enum class Store : int { kDense, kFlat, kNested };

constexpr int64_t kMost = 0x7FFFFFFF;  // rows, columns and programs are numbered by int; offsets are 64-bit

// What a plan depends on of a call.
struct Problem {
  int m, n, k, r;
  Type type;
  bool dropout;
  Store store;         // codes are read by few rows alone
  bool in_chunks;      // whether all rows of the large operands start at multiples of 16 bytes
  bool in_boxes;       // whether besides no rows overlap, as sm_90's copies ask
  bool backward;
  bool dx, da, db, dbias;
};

// One launch: the kernel's name, programs, threads of each, bytes of shared memory; how many programs must run at the same
// time for any to go on.
struct Launch {
  std::string kernel;
  int grid, threads, shared_bytes, together;
};

struct Plan {
  Launch large;
  int rows, columns;   // of a tile
  int ranks;           // that a tile takes at a time
  bool sm90a;          // whether the large launch is of a kernel for sm_90a
  Kinds kinds;         // of backward
  Grid grid;
  Shrink shrink;
  int segment;         // rows that a tile of da or db sums
  int counters;        // int32 zeros that the call needs, the last one its ticket
  int numbers;         // that programs take from it: of tiles, and of shares of forward's mask
  int64_t partials;    // float32 numbers that the call needs
  int mask_rows;       // that tiles of da leave the mask of to those of dx; 0: each draws its own
  int draws, share;    // of forward's mask, as in PackedMask
  int64_t mask_words;  // 32-bit numbers of it that the call needs
};

// A forward call that is bound by reading the weight: one launch of the kernel for few rows.
bool has_few_rows(const Problem& problem);

// The launch that decodes `count` elements of W to memory, in a type.
Launch decode_plan(int64_t count, Type type, Store store);

struct FewRowsPlan {
  Launch launch;
  int parts;           // of the columns of x and W
  int counters;        // int32 zeros that the call needs, the last ones its flag and its ticket
  int numbers;         // that programs take from it: of parts of tiles
  int64_t partials;    // float32 numbers that the call needs
};

FewRowsPlan few_rows_plan(const Problem& problem, const Device& device);

// Throws std::invalid_argument where no kernel serves the problem.
Plan plan(const Problem& problem, const Device& device);

}  // namespace lora_kernels

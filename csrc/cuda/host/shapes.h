// The shapes of tiles that ship, and the kernels made for them: one list for host and device.

#pragma once

namespace lora_kernels {

// Tiles of a large product: kRows by kColumns, kDepth a step, kStages steps in flight, warps in a grid.
template <int kRowsOfTile, int kColumnsOfTile, int kDepthOfStep, int kStagesOfRing, int kWarpsAlongM, int kWarpsAlongN,
          int kBytesOfElement = 2>
struct Shape {
  static constexpr int kSize = kBytesOfElement, kBarrier = 0;
  static constexpr int kRows = kRowsOfTile, kColumns = kColumnsOfTile, kDepth = kDepthOfStep;
  static constexpr int kStages = kStagesOfRing, kWarpsM = kWarpsAlongM, kWarpsN = kWarpsAlongN;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpRows = kRows / kWarpsM, kWarpColumns = kColumns / kWarpsN;
  static constexpr int kBlocksM = kWarpRows / 16, kBlocksN = kWarpColumns / 8;
  // Whether the main loop loads fragments ahead; of fewer sums a warp too, once that is built and counted.
  static constexpr bool kAhead = kBlocksM * kBlocksN > 16;
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0 && kDepth % 16 == 0, "whole fragments");
  // A warp makes the shrink of one 16-row block; those beside it, which read the same rows, of others.
  static_assert(kBlocksM == kWarpsN, "one block of the shrink product a warp");
};

using Wide = Shape<128, 256, 32, 3, 2, 4>;    // warps have 64 x 64 sums: the least to read for a product
using Large = Shape<128, 128, 64, 3, 2, 4>;   // where a program may have 160 KB of shared memory
using Medium = Shape<128, 128, 32, 4, 2, 4>;  // where it may have 99
using Tall = Shape<128, 64, 64, 3, 4, 2>;     // half of the sums: for ranks and masks that need the registers
using Small = Shape<64, 64, 64, 3, 2, 2>;     // for few tiles
using TallFloat = Shape<128, 64, 32, 3, 4, 2, 4>;  // float32
using SmallFloat = Shape<64, 64, 32, 3, 2, 2, 4>;
using LargeTf32 = Shape<128, 128, 32, 3, 2, 4, 4>;  // whose sums take no more registers than 16-bit elements'

// sm_90a: the threads that multiply; a warp has 16 rows and all columns, as wgmma gives them.
template <int kColumnsOfTile, int kStagesOfRing>
struct HopperShape : Shape<128, kColumnsOfTile, 64, kStagesOfRing, 8, 1> {
  static constexpr int kBarrier = 1;  // of theirs alone
};
using HopperWide = HopperShape<256, 3>;  // a wgmma of 64 x 256 reads the least for its products
using Hopper = HopperShape<128, 4>;      // for more ranks, and few columns
constexpr int kHopperCopying = 128;  // threads after them, which copy
constexpr int kHopperBox = 64;       // rows and columns of what is copied at once

// X(shape, ranks, dropout, whether rows start at multiples of 16 bytes)
#define LORA_EACH_FORWARD(X) \
  X(Wide, 16, 0, 1) X(Wide, 16, 1, 1) \
  X(Large, 16, 0, 1) X(Large, 16, 1, 1) X(Large, 64, 0, 1) X(Large, 64, 1, 1) \
  X(Medium, 16, 0, 1) X(Medium, 16, 1, 1) X(Medium, 64, 0, 1) X(Medium, 64, 1, 1) \
  X(Small, 16, 0, 1) X(Small, 16, 1, 1) X(Small, 64, 0, 1) X(Small, 64, 1, 1) X(Small, 16, 0, 0) X(Small, 16, 1, 0)

#define LORA_EACH_BACKWARD(X) \
  X(Wide, 16, 0, 1) X(Wide, 16, 1, 1) \
  X(Large, 16, 0, 1) X(Large, 16, 1, 1) X(Medium, 16, 0, 1) X(Medium, 16, 1, 1) X(Tall, 64, 0, 1) X(Tall, 64, 1, 1) \
  X(Small, 16, 0, 1) X(Small, 16, 1, 1) X(Small, 64, 0, 1) X(Small, 64, 1, 1) X(Small, 16, 0, 0) X(Small, 16, 1, 0)

#define LORA_EACH_FEW_ROWS(X) X()

// X(shape, ranks, dropout)
#define LORA_EACH_HOPPER(X) \
  X(HopperWide, 16, 0) X(HopperWide, 16, 1) X(Hopper, 16, 0) X(Hopper, 16, 1) X(Hopper, 64, 0) X(Hopper, 64, 1)

#define LORA_EACH_FORWARD_FLOAT(X) \
  X(TallFloat, 16, 0, 1) X(TallFloat, 16, 1, 1) X(TallFloat, 32, 0, 1) X(TallFloat, 32, 1, 1) \
  X(SmallFloat, 16, 0, 1) X(SmallFloat, 16, 1, 1) X(SmallFloat, 16, 0, 0) X(SmallFloat, 16, 1, 0)

#define LORA_EACH_BACKWARD_FLOAT(X) LORA_EACH_FORWARD_FLOAT(X)

#define LORA_EACH_FORWARD_TF32(X) \
  X(LargeTf32, 16, 0, 1) X(LargeTf32, 16, 1, 1) X(LargeTf32, 64, 0, 1) X(LargeTf32, 64, 1, 1) \
  X(TallFloat, 16, 0, 1) X(TallFloat, 16, 1, 1) X(TallFloat, 64, 0, 1) X(TallFloat, 64, 1, 1) \
  X(SmallFloat, 16, 0, 1) X(SmallFloat, 16, 1, 1) X(SmallFloat, 64, 0, 1) X(SmallFloat, 64, 1, 1) \
  X(SmallFloat, 16, 0, 0) X(SmallFloat, 16, 1, 0)

#define LORA_EACH_BACKWARD_TF32(X) \
  X(LargeTf32, 16, 0, 1) X(LargeTf32, 16, 1, 1) X(TallFloat, 16, 0, 1) X(TallFloat, 16, 1, 1) \
  X(TallFloat, 64, 0, 1) X(TallFloat, 64, 1, 1) X(SmallFloat, 16, 0, 1) X(SmallFloat, 16, 1, 1) \
  X(SmallFloat, 64, 0, 1) X(SmallFloat, 64, 1, 1) X(SmallFloat, 16, 0, 0) X(SmallFloat, 16, 1, 0)

// Shared memory of a kernel, which the device side checks against what it lays out there.
template <class S>
constexpr int ring_bytes(int ranks) {
  return S::kStages * S::kSize * S::kDepth * (S::kRows + S::kColumns + ranks);
}
template <class S>
constexpr int low_rank_bytes(int ranks) {
  return S::kSize * ranks * (S::kRows + S::kColumns);
}
constexpr int larger(int a, int b) { return a > b ? a : b; }

template <class S>
constexpr int forward_bytes(int ranks) {
  return larger(larger(ring_bytes<S>(ranks), low_rank_bytes<S>(ranks)), S::kSize * S::kRows * S::kColumns);
}
constexpr int kNumberBytes = 4;  // after these: a tile's number

// Rows of a step of sums are those of 16-bit elements; half of float32's.
constexpr int kSumColumns = 128, kSumRows = 64, kSumStages = 3;
constexpr int in_order_bytes(int ranks) { return 4 * larger(kSumColumns * (ranks + 1), ranks * (kSumColumns + 1)); }
constexpr int sum_bytes(int ranks) {
  return larger(kSumStages * 2 * kSumRows * (ranks + kSumColumns), in_order_bytes(ranks));
}
template <class S>
constexpr int backward_bytes(int ranks) {
  return larger(forward_bytes<S>(ranks), sum_bytes(ranks));
}
// Where results of sm_90a's kernels lie before they are stored: a tile, or sums in order.
template <class S>
constexpr int hopper_out_bytes(int ranks) {
  return larger(2 * S::kRows * S::kColumns, in_order_bytes(ranks));
}
template <class S>
constexpr int hopper_bytes(int ranks) {
  const int barriers = 8 * (2 * S::kStages + 2), numbers = kNumberBytes * S::kStages;
  return ring_bytes<S>(ranks) + low_rank_bytes<S>(ranks) + hopper_out_bytes<S>(ranks) + barriers + numbers;
}
// Few rows: tiles of 16 rows of x by as many rows of W, a program's warps sharing its columns.
constexpr int kFewRows = 16, kFewRowsColumns = 32, kFewRowsTile = kFewRows * kFewRowsColumns, kFewRowsWarps = 8;
constexpr int kFewRowsThreads = 32 * kFewRowsWarps, kFewRowsNumbers = kFewRowsTile / kFewRowsThreads;
constexpr int kFewRowsBytes = 4 * kFewRowsWarps * kFewRowsTile;
// Of W in four bits, which a thread of a quad reads: columns of a row in a step; threads that decode it to memory, eight each.
constexpr int kCodedColumns = 64, kDecodeThreads = 256, kDecoded = 8 * kDecodeThreads;
// Forward's mask: columns of a word, which holds what a thread has of two rows; columns that a warp draws at a time.
constexpr int kWordColumns = 64, kDrawnColumns = 4 * kWordColumns;

}  // namespace lora_kernels

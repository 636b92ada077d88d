// What forward and backward for sm_90a share: a warpgroup copies steps into a ring in shared memory, two multiply
// them, and neither waits for the other but through barriers. Copying runs on into the next tile while the last one
// is finished and stored.

#pragma once

#include "../epilogue.cuh"
#include "hopper.cuh"

namespace lora_kernels {

// What lies where in shared memory. Large operands come in boxes of 64 x 64, a box at a multiple of 1,024 bytes, as
// its permutation asks: the left one's below each other, the right one's as well, or beside each other if
// kByDepth, where it lies [depth, columns]; so do the shrink operand and the right low-rank factor then.
template <class T, class S, int kRanks, bool kByDepth>
struct HopperMemory {
  using Box = Tile<T, kHopperBox, kHopperBox>;
  using Left = Tile<T, S::kRows, S::kDepth>;
  using Shrink = std::conditional_t<kByDepth, Tile<T, S::kDepth, kRanks>, Tile<T, kRanks, S::kDepth>>;
  using LeftFactor = Tile<T, S::kRows, kRanks>;
  using RightFactor = std::conditional_t<kByDepth, Tile<T, kRanks, S::kColumns>, Tile<T, S::kColumns, kRanks>>;
  static_assert(S::kDepth == kHopperBox && kSumColumns <= S::kColumns, "whole boxes, and sums' in a stage");
  static constexpr int kLeftBoxes = S::kRows / kHopperBox, kRightBoxes = S::kColumns / kHopperBox;
  static constexpr int kBoxes = kLeftBoxes + kRightBoxes, kSumBoxes = kSumColumns / kHopperBox;
  static constexpr int kStageBytes = kBoxes * Box::kBytes;
  static constexpr int kShrink = S::kStages * kStageBytes, kLeftFactor = kShrink + S::kStages * Shrink::kBytes;
  static constexpr int kRightFactor = kLeftFactor + LeftFactor::kBytes, kOut = kRightFactor + RightFactor::kBytes;
  static constexpr int kBarriers = kOut + hopper_out_bytes<S>(kRanks);
  static constexpr int kNumbers = kBarriers + 8 * (2 * S::kStages + 2);
  static_assert(kNumbers + kNumberBytes * S::kStages == hopper_bytes<S>(kRanks), "what the host asks for");
  static_assert(kStageBytes % 1024 == 0 && kOut % 1024 == 0, "where boxes lie");

  uint32_t first;
  __device__ uint32_t left(int stage) const { return first + stage * kStageBytes; }
  __device__ uint32_t right(int stage) const { return left(stage) + kLeftBoxes * Box::kBytes; }
  __device__ uint32_t shrink(int stage) const { return first + kShrink + stage * Shrink::kBytes; }
  __device__ uint32_t left_factor() const { return first + kLeftFactor; }
  __device__ uint32_t right_factor() const { return first + kRightFactor; }
  __device__ uint32_t out() const { return first + kOut; }
  __device__ uint32_t filled(int stage) const { return first + kBarriers + 8 * stage; }
  __device__ uint32_t read(int stage) const { return filled(S::kStages + stage); }
  __device__ uint32_t factors_filled() const { return filled(2 * S::kStages); }
  __device__ uint32_t factors_read() const { return filled(2 * S::kStages + 1); }
  __device__ uint32_t number(int stage) const { return first + kNumbers + kNumberBytes * stage; }

  __device__ void init() const {
    for (int stage = 0; stage < S::kStages; ++stage) {
      init_barrier(filled(stage), kHopperCopying + 1);
      init_barrier(read(stage), S::kThreads / 32);
    }
    init_barrier(factors_filled(), kHopperCopying + 1);
    init_barrier(factors_read(), S::kThreads / 32);
    fence_barriers();
  }
};

// Where a side is in the ring, and the parity of the phase that it waits for there.
template <class S>
struct RingPosition {
  int stage, parity;
  __device__ void advance() {
    stage = stage + 1 == S::kStages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
};

// The warpgroup that copies; one of its threads starts the copies of boxes, and takes the numbers of tiles: see Numbers.
// A number lies beside the first step of its tile.
template <class T, class S, int kRanks, bool kByDepth>
struct CopyingSide {
  using M = HopperMemory<T, S, kRanks, kByDepth>;
  M memory;
  const Ticket& ticket;
  bool one;
  RingPosition<S> at{0, 1};
  int slices = 0, ahead = 0;

  static constexpr CopyMode kCopyMode{.first_thread = S::kThreads, .rolled = true};

  __device__ CopyingSide(M memory, const Ticket& ticket)
      : memory(memory), ticket(ticket), one(threadIdx.x == S::kThreads) {
    take();
  }
  __device__ void take() { ahead = take_number(ticket.next, ticket.last, one); }
  __device__ int next() const {
    wait_for_phase(memory.read(at.stage), at.parity);
    hand_number(ahead, memory.number(at.stage), one);
    synchronize<2, kHopperCopying>();
    return broadcast_number(memory.number(at.stage));
  }
  // A step without copies, for a number without any.
  __device__ void pass() {
    arrive(memory.filled(at.stage), one);
    arrive(memory.filled(at.stage));
    at.advance();
  }

  // Starts a step of so many boxes, as soon as nobody reads the stage any more.
  __device__ void begin(int boxes) const {
    wait_for_phase(memory.read(at.stage), at.parity);
    arrive_expecting(memory.filled(at.stage), boxes * M::Box::kBytes, one);
  }
  __device__ void left(const TensorMap& map, int row, int column) const {
    copy<M::kLeftBoxes, true>(memory.left(at.stage), map, row, column);
  }
  // The step's tile of W, dense; see weights.cuh.
  __device__ void weight(const TensorMap& map, int column, int depth) const {
    copy<M::kRightBoxes, !kByDepth>(memory.right(at.stage), map, kByDepth ? depth : column, kByDepth ? column : depth);
  }
  // What a tile of sums has in W's place.
  __device__ void summed(const TensorMap& map, int row, int column) const {
    copy<M::kSumBoxes, false>(memory.right(at.stage), map, row, column);
  }
  // Ends it, with the shrink operand at (row, column) of a matrix if there is one.
  __device__ void end(bool has_shrink, const Source& shrink, int row, int column) {
    if (has_shrink) {
      copy_tile<T, typename M::Shrink, kHopperCopying, kCopyMode>(memory.shrink(at.stage), shrink, row, column);
      arrive_after_copies(memory.filled(at.stage));
    } else {
      arrive(memory.filled(at.stage));
    }
    at.advance();
  }

  // Waits for another program. All lanes of a warp ask, so that none waits at the barrier for another.
  __device__ void wait(const int* flag, int arrivals) const {
    if (threadIdx.x / 32 == S::kThreads / 32) {
      // No limit here, where registers are few: the side that multiplies waits for this one, and has one.
      while (!__all_sync(0xFFFFFFFFu, acquire_load(flag) >= arrivals)) __nanosleep(32);
    }
    synchronize<2, kHopperCopying>();
  }
  // Counts this tile out of a row panel's readers, of whom the last one finds `last`, when all its copies have come.
  __device__ void leave(int* flag, int last) const {
    commit_copies();
    wait_for_copies<0>();
    synchronize<2, kHopperCopying>();
    count_out(flag, last, one);
  }

  // The low-rank factors of a tile at (row, column) are its last steps, a slice of ranks each: only here does a tile of the
  // large product wait for another program.
  __device__ void factors(int* flag, int arrivals, int last, const Source& left, int row, const Source& right, int column,
                          int ranks) {
    wait(flag, arrivals);
    take();
    for (int rank = 0; rank < ranks; rank += kRanks) {
      wait_for_phase(memory.factors_read(), ~slices++ & 1);
      copy_tile<T, typename M::LeftFactor, kHopperCopying, kCopyMode>(memory.left_factor(), left, row, rank);
      copy_tile<T, typename M::RightFactor, kHopperCopying, kCopyMode>(
          memory.right_factor(), right, kByDepth ? rank : column, kByDepth ? column : rank);
      // Those who wait may read more of what other programs left than these copies: only an arrival of one who has
      // waited for them passes that on, since the copies' own are ordered after the copies alone.
      arrive(memory.factors_filled(), one);
      arrive_after_copies(memory.factors_filled());
    }
    leave(flag, last);
  }

 private:
  template <int kBoxes, bool kBelow>
  __device__ void copy(uint32_t to, const TensorMap& map, int row, int column) const {
    const uint32_t filled = memory.filled(at.stage);
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      const int further = i * kHopperBox;
      copy_box(to + i * M::Box::kBytes, map.bytes, row + (kBelow ? further : 0), column + (kBelow ? 0 : further), filled, one);
    }
  }
};

// The warpgroups that multiply.
template <class T, class S, int kRanks, bool kByDepth>
struct MultiplyingSide {
  using M = HopperMemory<T, S, kRanks, kByDepth>;
  M memory;
  Place<S> place;
  RingPosition<S> at{0, 0};
  int slices = 0;

  __device__ explicit MultiplyingSide(M memory) : memory(memory) {}
  __device__ void arrive_by_warp(uint32_t barrier, bool does = true) const { arrive(barrier, does && threadIdx.x % 32 == 0); }

  // The number of the next tile, or of what else there is to do; for that it is a step to pass.
  __device__ int next() const {
    wait_for_phase_in_time(memory.filled(at.stage), at.parity);
    return broadcast_number(memory.number(at.stage));
  }
  __device__ void pass() {
    __syncwarp();
    arrive_by_warp(memory.read(at.stage));
    at.advance();
  }

  // sums = left right over all steps of a tile whose first row is `row`; a shrinking tile: shrink_sums = D(left) times the factor.
  template <bool kDropout>
  __device__ void product(Sums<S>& sums, ShrinkSums<kRanks>& shrink_sums, const Layer& layer, const PackedMask& mask, int row,
                          int steps, bool shrinks) {
    static_assert(S::kDepth == kWordColumns, "a word a step");
    // Of the warpgroup, so that the compiler knows it for the same in a warp.
    const int row_of_group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) * 64;
    const uint32_t left_first = operand(memory.left(0) + row_of_group * M::Left::kRowBytes);
    const uint32_t right_first = kept_in_register(
        kByDepth ? operand_by_depth(memory.right(0), M::Box::kBytes) : operand(memory.right(0)));
    const uint32_t* words = kDropout ? words_of(mask, layer, row + place.shrink_row, 0) + threadIdx.x % 32 : nullptr;
    int before = 0;
    sums.clear();
    for (int step = 0; step < steps; ++step) {
      const int stage = at.stage;
      wait_for_phase_in_time(memory.filled(stage), at.parity);
      const uint32_t word = kDropout ? load_fresh(words + 32 * step, shrinks) : 0;
      const uint32_t left = left_first + stage * (M::kStageBytes / 16), right = right_first + stage * (M::kStageBytes / 16);
      // 16 elements of depth: 32 bytes of a row, or 16 rows of 128.
      constexpr int kLeftStep = 32 / 16, kRightStep = kByDepth ? 16 * 128 / 16 : kLeftStep;
      begin_products();
      repeat<S::kDepth / 16>([&](auto slice) {
        multiply_async<T, kByDepth>(sums.v[0], left + kLeftStep * slice, right + kRightStep * slice);
      });
      commit_products();
      if (shrinks) add_shrink<kDropout>(shrink_sums, stage, word);
      wait_for_products<1>();
      arrive_by_warp(memory.read(before), step);
      before = stage;
      at.advance();
    }
    wait_for_products<0>();
    arrive_by_warp(memory.read(before));
  }

  // sums += scale * D(factors' product), D by the mask that `make_mask` returns once other programs have left it, the
  // scale of a slice of ranks scale_at(its first).
  template <class F, class G>
  __device__ void add_factors(Sums<S>& sums, F make_mask, const Operands& of, G scale_at) {
    wait_for_phase_in_time(memory.factors_filled(), slices & 1);
    const auto mask = make_mask();
    for (int rank = 0; rank < of.depth; rank += kRanks) {
      wait_for_phase(memory.factors_filled(), slices++ & 1);
      add_ranks<T, S, kRanks, kByDepth>(
          sums, place, mask, of, scale_at(rank), of.depth - rank, memory.left_factor(), memory.right_factor());
      __syncwarp();
      arrive_by_warp(memory.factors_read());
    }
  }

  // Until nothing is copied from where results lie before they are stored; for that `store` leaves its copies under way.
  __device__ void await_boxes() const {
    wait_for_boxes_read();
    synchronize<S>();
  }
  // Stores the sums as elements of T where a map has the tile at (row, column).
  __device__ void store(const Sums<S>& sums, const TensorMap& map, int row, int column) const {
    using Out = Tile<T, S::kRows, kHopperBox>;  // boxes below each other
    await_boxes();
    const Place<S> now;
    repeat<S::kBlocksN>([&](auto j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t to = memory.out() + j / 8 * Out::kBytes + Out::offset(now.row(0) + 8 * half, j % 8) + 4 * now.t;
        const uint32_t pair = pair_of<T>(sums.v[0][j][2 * half], sums.v[0][j][2 * half + 1]);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(pair) : "memory");
      }
    });
    fence_stores();
    synchronize<S>();
#pragma unroll
    for (int i = 0; i < M::kRightBoxes * M::kLeftBoxes; ++i) {
      const int box_row = i % M::kLeftBoxes * kHopperBox, box_column = i / M::kLeftBoxes * kHopperBox;
      store_box(map.bytes, row + box_row, column + box_column, memory.out() + i * M::Box::kBytes, threadIdx.x == 0);
    }
    commit_boxes();
  }

 private:
  // The shrink of a warp's 16 rows from one step; `word` has this thread's bits of D.
  template <bool kDropout>
  __device__ void add_shrink(ShrinkSums<kRanks>& sums, int stage, uint32_t word) const {
    const LeftReader<typename M::Left> left(place.shrink_row);
    const RightReader<typename M::Shrink, kByDepth> shrink(0);
    repeat<S::kDepth / kDeep<T>>([&](auto slice) {
      Left<T> kept;
      left.template read<0>(kept, memory.left(stage), slice);
      if (kDropout) keep_by_word<slice>(kept, word);
      repeat<kRanks / 16>([&](auto j) {
        Right<T> f;
        shrink.template read<16 * j, slice>(f, memory.shrink(stage));
        multiply<T>(sums.v[2 * j], kept, f[0], f[1]);
        multiply<T>(sums.v[2 * j + 1], kept, f[2], f[3]);
      });
    });
  }
};

// Adds the bias to a warp's 16 rows: a lane loads what its quad adds to every eighth block, and other quads have it from it.
template <class T, class S>
__device__ inline void add_bias_of(Sums<S>& sums, const uint16_t* bias, int column, int columns) {
  constexpr int kQuads = 8, kPairs = S::kBlocksN / kQuads;
  static_assert(S::kBlocksM == 1 && S::kBlocksN % kQuads == 0, "as many blocks for each group");
  const Place<S> place;
  uint32_t pairs[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int n = column + place.column(kQuads * i + place.group);
    const uint32_t low = n < columns ? bias[n] : 0, high = n + 1 < columns ? bias[n + 1] : 0;
    pairs[i] = low | high << 16;
  }
#pragma unroll
  for (int j = 0; j < S::kBlocksN; ++j) {
    const uint32_t pair = __shfl_sync(0xFFFFFFFFu, pairs[j / kQuads], 4 * (j % kQuads) + place.t);
    const float low = number<T>(static_cast<uint16_t>(pair)), high = number<T>(static_cast<uint16_t>(pair >> 16));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sums.v[0][j][2 * half] += low;
      sums.v[0][j][2 * half + 1] += high;
    }
  }
}

// Divides a program's warpgroups, and its registers, between the sides.
template <class Memory, class S, class Copy, class Multiply>
__device__ inline void run_sides(Copy copy, Multiply multiply) {
  extern __shared__ __align__(1024) char dynamic[];
  const Memory memory{shared_address(dynamic)};
  if (threadIdx.x == 0) memory.init();
  __syncthreads();
  if (threadIdx.x >= S::kThreads) {
    give_registers<40>();
    copy(memory);
  } else {
    take_registers<232>();
    multiply(memory);
  }
}

}  // namespace lora_kernels

// Which tile comes when, and how programs wait for each other's.

#pragma once

#include "../host/params.h"
#include "ptx.cuh"

namespace lora_kernels {

struct Position {
  int row, column;
};

// The index-th tile, kGroup rows at a time: operands stay in L2.
__device__ inline Position grouped_tile(int index, int rows, int columns) {
  constexpr int kGroup = 8;
  const int in_group = kGroup * columns, first = index / in_group * kGroup, height = min(rows - first, kGroup);
  return {first + index % in_group % height, index % in_group / height};
}

// A tile of a large product, of a slice of ranks of the shrink, or of both.
struct LargeTile {
  int row, column, panel;
  int rank;  // the slice's first
  bool shrinks;
};

// The index-th of the tiles that make the shrink alone.
template <class S, int kRanks>
__device__ inline LargeTile shrink_tile(const Shrink& shrink, int index) {
  const int panel = index / shrink.slices;
  return {panel * S::kRows, 0, panel, index % shrink.slices * kRanks, true};
}

// The index-th tile, of the large product: first those of shrinking columns, then, after as many others, the rest.
// Shrinking tiles of a row panel wait for each other once they have published; so they are neighbours.
template <class S, int kRanks>
__device__ inline LargeTile large_tile(const Grid& grid, const Shrink& shrink, int index, int others) {
  const int xa_columns = shrink.xa_columns, makers = grid.panels * xa_columns;
  const bool shrinks = index < makers;
  Position at;
  if (shrinks) {
    at = {index / xa_columns, index % xa_columns};
  } else {
    at = grouped_tile(index - makers - shrink.alone - others, grid.panels, grid.columns - xa_columns);
    at.column += xa_columns;
  }
  return {at.row * S::kRows, at.column * S::kColumns, at.row, shrinks ? at.column * kRanks : 0, shrinks};
}

// Makes these threads' stores visible to whoever waits on the flag.
template <class S = AllThreads>
__device__ inline void publish(int* flag) {
  synchronize<S>();
  release_add(flag, threadIdx.x == 0);
}

__device__ inline void wait(const int* flag, int arrivals) {
  if (threadIdx.x == 0) {
    const Wait wait;
    while (acquire_load(flag) < arrivals) wait.pause();
  }
  __syncthreads();
}

// Counts a consumer out; the last one, who finds `last` there, leaves a zero behind.
template <class S = AllThreads>
__device__ inline void leave(int* flag, int last) {
  synchronize<S>();
  count_out(flag, last, threadIdx.x == 0);
}

// Counts a program in and tells its threads whether it is the last of `parts`, which leaves a zero behind.
template <class S = AllThreads>
__device__ inline bool last_to_arrive(int* counter, int parts, uint32_t shared) {
  synchronize<S>();
  if (threadIdx.x == 0) {
    const int before = count_up(counter);
    if (before == parts - 1) atomicExch(counter, 0);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(before) : "memory");
  }
  synchronize<S>();
  int before;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(before) : "r"(shared) : "memory");
  synchronize<S>();
  return before == parts - 1;
}

// Numbers of tiles, and of what comes before them, as a program takes them one by one. The ticket is zero before and after.
//
// Any number of running programs makes progress. Numbers go out in order, each to a program that runs and works on its own
// in order. So the lowest that isn't finished is worked on, and where tiles wait for lower numbers alone it waits for
// nothing. Of several shrinking columns it may wait for neighbours after it. A program has no number ahead while it waits,
// so if none goes on, each has one of these neighbours; all of them are taken if there are as many programs as columns,
// and whoever has one publishes before it waits.
struct Numbers {
  const Ticket ticket;
  uint32_t shared;  // where a number is left for all threads
  int ahead = 0;    // thread 0's

  // Takes the next number ahead: the tile at hand has waited for all that it waits for. Nothing is kept over a tile for it:
  // the ticket is a kernel's parameter, and the thread is asked for anew.
  __device__ void take() { ahead = take_number(ticket.next, ticket.last, kept_in_register(threadIdx.x) == 0); }
  // Tells it to all threads; from `count` on there is nothing left to do.
  __device__ int next() const {
    hand_number(ahead, shared, kept_in_register(threadIdx.x) == 0);
    __syncthreads();
    return broadcast_number(shared);
  }
};

}  // namespace lora_kernels

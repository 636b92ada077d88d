// The instructions of sm_90a that a pipeline of asynchronous copies and products is made of.

#pragma once

#include "../ptx.cuh"

namespace lora_kernels {

// A barrier in shared memory: a phase ends when so many threads have arrived and all bytes announced have come.
__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// `does`: whether this thread does, by a predicate, since a branch would divide the warp.
__device__ inline void arrive(uint32_t barrier, bool does = true) {
  asm volatile(
      "{ .reg .pred p; .reg .b64 state; setp.ne.b32 p, %1, 0; @p mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier),
      "r"(static_cast<int>(does))
      : "memory");
}
__device__ inline void arrive_expecting(uint32_t barrier, int bytes, bool does) {
  asm volatile(
      "{ .reg .pred p; .reg .b64 state; setp.ne.b32 p, %2, 0; "
      "@p mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(barrier),
      "r"(bytes), "r"(static_cast<int>(does))
      : "memory");
}
// Arrives when this thread's copies by cp.async have come.
__device__ inline void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Whether a phase with this parity has ended, at the latest after some time.
__device__ inline bool has_ended(uint32_t barrier, int parity) {
  int done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}
// Waits for its end.
__device__ inline void wait_for_phase(uint32_t barrier, int parity) {
  while (!has_ended(barrier, parity)) {
  }
}
// Waits for its end, where that may need another program.
__device__ inline void wait_for_phase_in_time(uint32_t barrier, int parity) {
  if (has_ended(barrier, parity)) return;
  const Wait wait;
  while (!has_ended(barrier, parity)) wait.check();
}

// What barriers were initialised is visible to copies.
__device__ inline void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// What this thread stored to shared memory comes before what copies of boxes write there next.
__device__ inline void fence_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies the box of a map that starts at (row, column) to shared memory; its bytes count for the barrier.
__device__ inline void copy_box(uint32_t to, const void* map, int row, int column, uint32_t barrier, bool does) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %5, 0; "
      "@p cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4]; }" ::"r"(
          to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "r"(static_cast<int>(does))
      : "memory");
}

// Copies a box of shared memory to where a map has it at (row, column), but for what lies beyond the matrix.
__device__ inline void store_box(const void* map, int row, int column, uint32_t from, bool does) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %4, 0; "
      "@p cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3]; }" ::"l"(map),
      "r"(column), "r"(row), "r"(from), "r"(static_cast<int>(does))
      : "memory");
}
__device__ inline void commit_boxes() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until the boxes that this thread stores are read, or written too.
__device__ inline void wait_for_boxes_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void wait_for_boxes() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// More or fewer registers for all threads of a warpgroup.
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- products of a warpgroup: 64 rows, operands in shared memory ----

// What products know of a tile whose rows are 128 bytes of the summed dimension, its chunks permuted by copies that swizzle 128
// bytes: addresses of shared memory count 16 bytes.
__device__ inline uint32_t operand(uint32_t tile) { return tile >> 4 | 1 << 16; }

// Of the same tile, [depth, 64 columns], for products over its rows; the next 64 columns lie `apart` bytes further.
__device__ inline uint32_t operand_by_depth(uint32_t tile, int apart) { return tile >> 4 | (apart >> 4) << 16; }

// The same as the instruction takes it.
__device__ inline uint64_t descriptor(uint32_t operand) {
  constexpr uint32_t kRowsApart = 1024 >> 4, kSwizzle128 = 1u << 30;
  return uint64_t{kRowsApart | kSwizzle128} << 32 | operand;
}

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// sums [64 x 128] or [64 x 256] += a [64 x 16] b [16 x as many]; kByDepth: b's tile is one of operand_by_depth.
#define LORA_WGMMA_128(type)                                                                                  \
  asm volatile(                                                                                               \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                            \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "     \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "       \
      "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "       \
      "%59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, 0, %66;"                                                  \
      : LORA_SUMS(0), LORA_SUMS(1), LORA_SUMS(2), LORA_SUMS(3), LORA_SUMS(4), LORA_SUMS(5), LORA_SUMS(6),     \
        LORA_SUMS(7), LORA_SUMS(8), LORA_SUMS(9), LORA_SUMS(10), LORA_SUMS(11), LORA_SUMS(12), LORA_SUMS(13), \
        LORA_SUMS(14), LORA_SUMS(15)                                                                          \
      : "l"(descriptor(a)), "l"(descriptor(b)), "n"(static_cast<int>(kByDepth)))
#define LORA_WGMMA_256(type)                                                                                                     \
  asm volatile(                                                                                                                  \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                                               \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "                        \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "                          \
      "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "                          \
      "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "                          \
      "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, "                          \
      "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "                            \
      "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, 1, 1, 1, 0, %130;" \
      : LORA_SUMS(0), LORA_SUMS(1), LORA_SUMS(2), LORA_SUMS(3), LORA_SUMS(4), LORA_SUMS(5), LORA_SUMS(6),                        \
        LORA_SUMS(7), LORA_SUMS(8), LORA_SUMS(9), LORA_SUMS(10), LORA_SUMS(11), LORA_SUMS(12), LORA_SUMS(13),                    \
        LORA_SUMS(14), LORA_SUMS(15), LORA_SUMS(16), LORA_SUMS(17), LORA_SUMS(18), LORA_SUMS(19), LORA_SUMS(20),                 \
        LORA_SUMS(21), LORA_SUMS(22), LORA_SUMS(23), LORA_SUMS(24), LORA_SUMS(25), LORA_SUMS(26), LORA_SUMS(27),                 \
        LORA_SUMS(28), LORA_SUMS(29), LORA_SUMS(30), LORA_SUMS(31)                                                               \
      : "l"(descriptor(a)), "l"(descriptor(b)), "n"(static_cast<int>(kByDepth)))
#define LORA_SUMS(j) "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])

template <class T, bool kByDepth>
__device__ inline void multiply_async(float (&sums)[16][4], uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    LORA_WGMMA_128("f16");
  } else {
    LORA_WGMMA_128("bf16");
  }
}
template <class T, bool kByDepth>
__device__ inline void multiply_async(float (&sums)[32][4], uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    LORA_WGMMA_256("f16");
  } else {
    LORA_WGMMA_256("bf16");
  }
}

#undef LORA_WGMMA_128
#undef LORA_WGMMA_256
#undef LORA_SUMS

}  // namespace lora_kernels

// The PTX instructions that C++ has no word for, one small function each.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#include <utility>

namespace lora_kernels {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes past L1 to `to` + kOffset; bytes from `count` on become zeros without being read.
template <int kOffset = 0>
__device__ inline void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1], 16;" ::"r"(to), "l"(from), "n"(kOffset) : "memory");
}
template <int kOffset = 0>
__device__ inline void copy_async(uint32_t to, const void* from, int count) {
  asm volatile("cp.async.cg.shared.global [%0 + %3], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(count), "n"(kOffset)
               : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread's copies are under way.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; each lane names a row of 16 bytes, at `from` + kOffset.
template <int kOffset = 0>
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from), "n"(kOffset)
               : "memory");
}
template <int kOffset = 0>
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from), "n"(kOffset)
               : "memory");
}

// Waits for kThreads threads of the program that take the same barrier, 1 to 15.
template <int kBarrier, int kThreads>
__device__ inline void synchronize() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}
// For the threads of a shape: all of a program's, or those with a barrier of their own.
struct AllThreads {
  static constexpr int kBarrier = 0;
};
template <class S>
__device__ inline void synchronize() {
  if constexpr (S::kBarrier == 0) {
    __syncthreads();
  } else {
    synchronize<S::kBarrier, S::kThreads>();
  }
}

// The compiler takes the number for one that it can't compute again: it keeps it in a register.
__device__ inline int kept_in_register(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Four bytes of a (0 to 3) and b (4 to 7), by the low three bits of a selector's first four nibbles, whose fourth bit is zero.
__device__ inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

// A number known when compiled, passed as an argument.
template <int kValue>
struct Constant {
  __host__ __device__ constexpr operator int() const { return kValue; }
};

// Calls f with 0, 1, ... kCount - 1 as constants.
template <int kCount, class F>
__device__ inline void repeat(F f) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    (f(Constant<kIndex>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// float32 in memory, rounded to TF32 for products on tensor cores.
struct Tf32 {
  float value;
};
// Whether products are float32's own, not those of tensor cores.
template <class T>
constexpr bool kPlain = std::is_same_v<T, float>;

// sum [16 x 8] += a [16 x 16] b [16 x 8], float32 sums; TF32: a [16 x 8] b [8 x 8].
template <class T>
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply<__nv_bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply<__half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply<Tf32>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounded to the nearest TF32, but for the low 13 bits, which tensor cores drop: without it they would drop them of
// the number itself, which errs twice as much, and to one side. cvt.rna.tf32.f32 clears them by an instruction more.
__device__ inline uint32_t near_tf32(uint32_t bits) {
  return fabsf(__uint_as_float(bits)) < __uint_as_float(0x7F800000u) ? bits + 0x1000u : bits;
}
// What tensor cores take away from a number rounded so; nothing from infinity.
__device__ inline uint32_t rest_of_tf32(uint32_t bits) {
  const uint32_t taken = near_tf32(bits) & ~0x1FFFu;
  return taken == bits ? 0 : __float_as_uint(__uint_as_float(bits) - __uint_as_float(taken));
}

// The same by plain float32 products, four deep, in order: rows lane / 4 and that + 8 of a, columns 2 (lane % 4) and
// the next of b.
__device__ inline float plus_product(float sum, float4 a, float4 b) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}
template <class T>
__device__ inline void multiply(float (&sum)[4], const float4 (&a)[2], float4 b0, float4 b1) {
  sum[0] = plus_product(sum[0], a[0], b0);
  sum[1] = plus_product(sum[1], a[0], b1);
  sum[2] = plus_product(sum[2], a[1], b0);
  sum[3] = plus_product(sum[3], a[1], b1);
}

// The same for long sums: float32 products are added up four by four, since one chain of all errs more than a library's.
template <class T, class A, class B>
__device__ inline void multiply_long(float (&sum)[4], const A& a, const B& b0, const B& b1) {
  if constexpr (kPlain<T>) {
    float of_four[4] = {};
    multiply<T>(of_four, a, b0, b1);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += of_four[e];
  } else {
    multiply<T>(sum, a, b0, b1);
  }
}

// Stores four 16-bit numbers, or nothing: by a predicate, since a branch would divide the warp.
__device__ inline void store_four(uint16_t* to, uint2 four, bool does) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2}; }" ::"l"(to), "r"(four.x),
               "r"(four.y), "r"(static_cast<int>(does))
               : "memory");
}

// ---- flags between programs ----

// Adds one to a flag; what this thread wrote before is visible to whoever sees the sum.
// `does`: whether this thread does, by a predicate, since a branch would divide the warp.
__device__ inline void release_add(int* flag, bool does) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %1, 0; @p red.release.gpu.global.add.s32 [%0], 1; }" ::"l"(flag),
               "r"(static_cast<int>(does))
               : "memory");
}

__device__ inline int acquire_load(const int* flag) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// A wait that may need another program, which ends the kernel by an error where it has lasted for about half a minute: far longer
// than any launch, so that the other will never come.
struct Wait {
  uint32_t began = now();

  __device__ static uint32_t now() {  // in 2^32 ns
    uint32_t time;
    asm volatile("mov.u32 %0, %%globaltimer_hi;" : "=r"(time));
    return time;
  }
  __device__ void check() const {
    asm volatile("{ .reg .pred late; setp.gt.u32 late, %0, 7; @late trap; }" ::"r"(now() - began));
  }
  __device__ void pause() const {
    __nanosleep(32);
    check();
  }
};

// Adds one to a ticket and returns what was there: a number that nobody else has. After `last`, a launch's, it is zero
// again. `does`: as above.
__device__ inline int take_number(int* ticket, int last, bool does) {
  int number;
  // Other threads' numbers are nothing. On sm_120 the one before is kept for it over a tile, and spilled, unless it is zero; on
  // sm_80 the zero is what makes a kernel spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define LORA_ELSE_ZERO "mov.b32 %0, 0; "
#else
#define LORA_ELSE_ZERO
#endif
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; " LORA_ELSE_ZERO
               "@p atom.relaxed.gpu.global.inc.u32 %0, [%1], %2; }"
#undef LORA_ELSE_ZERO
               : "=&r"(number)
               : "l"(ticket), "r"(last), "r"(static_cast<int>(does))
               : "memory");
  return number;
}
// Leaves a number in shared memory. `does`: as above.
__device__ inline void hand_number(int number, uint32_t to, bool does) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p st.shared.b32 [%1], %0; }" ::"r"(number), "r"(to),
               "r"(static_cast<int>(does))
               : "memory");
}
__device__ inline int broadcast_number(uint32_t at) {
  int number;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(number) : "r"(at) : "memory");
  return number;
}

// Adds one and returns what was there; both releases and acquires.
__device__ inline int count_up(int* flag) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(flag) : "memory");
  return before;
}

// Counts a consumer out; the last one, who finds `last` there, leaves a zero behind. `does`: as above.
__device__ inline void count_out(int* flag, int last, bool does) {
  asm volatile(
      "{ .reg .pred p, q; .reg .b32 seen; setp.ne.b32 p, %2, 0; mov.b32 seen, 0; "
      "@p atom.acq_rel.gpu.global.add.s32 seen, [%0], 1; setp.eq.and.s32 q, seen, %1, p; "
      "@q st.relaxed.gpu.global.s32 [%0], 0; }" ::"l"(flag),
      "r"(last), "r"(static_cast<int>(does))
      : "memory");
}

// sum += addend where the bits aren't zero: by a predicate, not a choice of two sums.
__device__ inline void add_if(float& sum, float addend, uint32_t bits) {
  asm("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p add.f32 %0, %0, %1; }" : "+f"(sum) : "f"(addend), "r"(bits));
}

// By a predicate, and no store that C++ knows of: one of bytes might change whatever a kernel keeps in registers.
__device__ inline void store_byte_if(bool does, uint8_t* to, uint32_t value) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.u8 [%0], %1; }"
               :
               : "l"(to), "r"(value), "r"(static_cast<int>(does)));
}

// By one access: left to itself the compiler may store word by word what it has in four registers.
__device__ inline void store_words(uint32_t* to, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Memory that other programs wrote in this launch: past L1, which may hold what was there before. Zero where it is
// not `there`: by a predicate, since a branch would divide the warp.
__device__ inline uint16_t load_fresh(const uint16_t* from, bool there) {
  uint16_t value;
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.u16 %0, 0; @p ld.global.cg.u16 %0, [%1]; }"
               : "=h"(value)
               : "l"(from), "r"(static_cast<int>(there))
               : "memory");
  return value;
}

__device__ inline uint32_t load_fresh(const uint32_t* from, bool there) {
  uint32_t value;
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.u32 %0, 0; @p ld.global.cg.u32 %0, [%1]; }"
               : "=r"(value)
               : "l"(from), "r"(static_cast<int>(there))
               : "memory");
  return value;
}

__device__ inline uint32_t load_fresh_word(const void* from) {
  uint32_t value;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ inline float load_fresh(const float* from, bool there) {
  float value;
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.f32 %0, 0f00000000; @p ld.global.cg.f32 %0, [%1]; }"
               : "=f"(value)
               : "l"(from), "r"(static_cast<int>(there))
               : "memory");
  return value;
}

}  // namespace lora_kernels

// The kernels for AVX512 processors.

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <type_traits>

// After the headers: what they define must not be compiled for this instruction set alone.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx2")

// g++ 12 defines no macros of the target that a pragma sets.
#define LORA_WIDTH 16
#define LORA_PAIRS 0
#define LORA_TILES 0

namespace lora_kernels {

#include "simd.inc"

#include "panels.inc"
#include "philox.inc"
#include "tiles.inc"
#include "products.inc"

#include "few_rows.inc"
#include "sums.inc"

#include "table.inc"

const Kernels avx512_kernels = table_of("avx512");

}  // namespace lora_kernels

#pragma GCC pop_options

#endif

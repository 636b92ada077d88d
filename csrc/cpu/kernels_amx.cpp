// The kernels for processors with a matrix unit (AMX) for bfloat16; all else is AVX512.

#include "kernels.h"

#if LORA_HAS_TILES

#include <immintrin.h>

#include <algorithm>
#include <type_traits>

// After the headers: what they define must not be compiled for this instruction set alone.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2,amx-tile,amx-bf16")

// g++ 12 defines no macros of the target that a pragma sets.
#define LORA_WIDTH 16
#define LORA_PAIRS 1
#define LORA_TILES 1

namespace lora_kernels {

#include "simd.inc"

#include "panels.inc"
#include "philox.inc"
#include "tiles.inc"
#include "products.inc"

#include "few_rows.inc"
#include "sums.inc"

#include "table.inc"

const Kernels amx_kernels = table_of("amx");

}  // namespace lora_kernels

#pragma GCC pop_options

#endif

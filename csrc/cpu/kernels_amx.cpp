// The kernels for processors with a matrix unit (AMX) for bfloat16; all else is AVX512.

#include "kernels.h"

#if LORA_HAS_TILES

#include <immintrin.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "compiler.h"

LORA_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2,amx-tile,amx-bf16")

// g++ 12 defines no macros of a target that is set so.
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

LORA_TARGET_END

#endif

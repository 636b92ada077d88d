// The kernels for AVX512 processors.

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "compiler.h"

LORA_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,fma,avx2")

// g++ 12 defines no macros of a target that is set so.
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

LORA_TARGET_END

#endif

// The kernels for AVX2 processors.

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "compiler.h"

LORA_TARGET_BEGIN("avx2,fma")

// g++ 12 defines no macros of a target that is set so.
#define LORA_WIDTH 8
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

const Kernels avx2_kernels = table_of("avx2");

}  // namespace lora_kernels

LORA_TARGET_END

#endif

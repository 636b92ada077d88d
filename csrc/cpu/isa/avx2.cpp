// The kernels for AVX2 processors.

#include "../kernels.h"

#if defined(__x86_64__)
#define LORA_TARGET "avx2,fma"
#define LORA_WIDTH 8
#define LORA_PAIRS 0
#define LORA_TILES 0
#include "../kernels/all.inc"
const lora_kernels::Kernels lora_kernels::avx2_kernels = table_of("avx2");
#endif

// The kernels for AVX512 processors that multiply bfloat16.

#include "../kernels.h"

#if defined(__x86_64__)
#define LORA_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2"
#define LORA_WIDTH 16
#define LORA_PAIRS 1
#define LORA_TILES 0
#include "../kernels/all.inc"
const lora_kernels::Kernels lora_kernels::avx512_bf16_kernels = table_of("avx512_bf16");
#endif

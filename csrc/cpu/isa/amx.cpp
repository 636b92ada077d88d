// The kernels for processors with a matrix unit (AMX) for bfloat16; all else is AVX512.

#include "../kernels.h"

#if LORA_HAS_TILES
#define LORA_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2,amx-tile,amx-bf16"
#define LORA_WIDTH 16
#define LORA_PAIRS 1
#define LORA_TILES 1
#include "../kernels/all.inc"
const lora_kernels::Kernels lora_kernels::amx_kernels = table_of("amx");
#endif

// Kernels that read W in four bits, and their table: for few rows of 16-bit elements, and to memory.

#include "../device/codes.cuh"
#include "../host/kernels.h"

namespace lora_kernels {

// X(kind, name of the type, type, scales, whether they are nested)
#define LORA_EACH_TYPE(X, kind, scales, nested) \
  X(kind, bf16, __nv_bfloat16, scales, nested) X(kind, half, __half, scales, nested)
#define LORA_EACH_FEW_ROWS_OF_CODES(X) LORA_EACH_TYPE(X, few_rows, flat, false) LORA_EACH_TYPE(X, few_rows, nested, true)
#define LORA_EACH_DECODE(X)                                                             \
  LORA_EACH_TYPE(X, decode, flat, false) LORA_EACH_TYPE(X, decode, nested, true)        \
  X(decode, float, float, flat, false) X(decode, float, float, nested, true)

#define LORA_DEFINE(Params, threads, kind, name, T, scales, nested)                     \
  extern "C" __global__ void __launch_bounds__(threads, 1)                              \
      lora_##kind##_##scales##_##name(const __grid_constant__ Params params) {          \
    kind<T, nested>(params);                                                            \
  }
#define LORA_DEFINE_FEW_ROWS(...) LORA_DEFINE(CodedFewRowsParams, kFewRowsThreads, __VA_ARGS__)
#define LORA_DEFINE_DECODE(...) LORA_DEFINE(DecodeParams, kDecodeThreads, __VA_ARGS__)

LORA_EACH_FEW_ROWS_OF_CODES(LORA_DEFINE_FEW_ROWS)
LORA_EACH_DECODE(LORA_DEFINE_DECODE)

Kernels codes_kernels() {
#define LORA_ENTRY(kind, name, T, scales, nested)                                       \
  {"lora_" #kind "_" #scales "_" #name, reinterpret_cast<const void*>(&lora_##kind##_##scales##_##name)},
  static const Kernel kernels[] = {LORA_EACH_FEW_ROWS_OF_CODES(LORA_ENTRY) LORA_EACH_DECODE(LORA_ENTRY)};
  return {kernels, sizeof kernels / sizeof *kernels};
}

}  // namespace lora_kernels

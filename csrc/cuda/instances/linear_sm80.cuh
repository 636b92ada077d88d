// Kernels for sm_80 and newer, by cp.async, ldmatrix and mma.sync: all that shapes.h lists, of one element type, and
// their table. A file for each type defines LORA_TYPE, the word in its kernels' names, LORA_ELEMENT, LORA_TABLE, and
// the lists LORA_FORWARD, LORA_BACKWARD and LORA_FEW_ROWS.

#include "../device/backward.cuh"
#include "../device/few_rows.cuh"
#include "../device/forward.cuh"
#include "../host/kernels.h"

#define LORA_JOIN(kind, shape, type, ranks, dropout, chunks) \
  lora_##kind##_##shape##_##type##_r##ranks##_d##dropout##_c##chunks
#define LORA_JOIN_FEW_ROWS(type) lora_few_rows_##type
// Arguments are expanded before they are joined.
#define LORA_EXPAND(macro, ...) macro(__VA_ARGS__)
#define LORA_NAME(kind, shape, ranks, dropout, chunks) LORA_EXPAND(LORA_JOIN, kind, shape, LORA_TYPE, ranks, dropout, chunks)
#define LORA_FEW_ROWS_NAME() LORA_EXPAND(LORA_JOIN_FEW_ROWS, LORA_TYPE)

#define LORA_DEFINE(kind, Params, shape, ranks, dropout, chunks)                        \
  extern "C" __global__ void __launch_bounds__(shape::kThreads, 1)                      \
      LORA_NAME(kind, shape, ranks, dropout, chunks)(const __grid_constant__ Params params) { \
    kind<LORA_ELEMENT, shape, ranks, dropout, chunks>(params);                          \
  }
#define LORA_DEFINE_FORWARD(...) LORA_DEFINE(forward, ForwardParams, __VA_ARGS__)
#define LORA_DEFINE_BACKWARD(...) LORA_DEFINE(backward, BackwardParams, __VA_ARGS__)
#define LORA_DEFINE_FEW_ROWS()                                               \
  extern "C" __global__ void __launch_bounds__(kFewRowsThreads, 1)           \
      LORA_FEW_ROWS_NAME()(const __grid_constant__ FewRowsParams params) {   \
    few_rows<LORA_ELEMENT>(params);                                          \
  }

namespace lora_kernels {

LORA_FORWARD(LORA_DEFINE_FORWARD)
LORA_BACKWARD(LORA_DEFINE_BACKWARD)
LORA_FEW_ROWS(LORA_DEFINE_FEW_ROWS)

Kernels LORA_TABLE() {
#define LORA_STRING(name) #name
#define LORA_ENTRY(name) {LORA_STRING(name), reinterpret_cast<const void*>(&name)},
#define LORA_FORWARD_ENTRY(...) LORA_EXPAND(LORA_ENTRY, LORA_NAME(forward, __VA_ARGS__))
#define LORA_BACKWARD_ENTRY(...) LORA_EXPAND(LORA_ENTRY, LORA_NAME(backward, __VA_ARGS__))
#define LORA_FEW_ROWS_ENTRY() LORA_EXPAND(LORA_ENTRY, LORA_FEW_ROWS_NAME())
  static const Kernel kernels[] = {
      LORA_FORWARD(LORA_FORWARD_ENTRY) LORA_BACKWARD(LORA_BACKWARD_ENTRY) LORA_FEW_ROWS(LORA_FEW_ROWS_ENTRY)};
  return {kernels, sizeof kernels / sizeof *kernels};
}

}  // namespace lora_kernels

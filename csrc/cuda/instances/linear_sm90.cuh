// Kernels for sm_90a, of one 16-bit element type, and their table; as linear_sm80.cuh.

#include "../device/sm90/backward.cuh"
#include "../device/sm90/forward.cuh"
#include "../host/kernels.h"

#define LORA_JOIN(kind, shape, type, ranks, dropout) lora_##kind##_##shape##_##type##_r##ranks##_d##dropout##_c1
#define LORA_EXPAND(macro, ...) macro(__VA_ARGS__)
#define LORA_NAME(kind, shape, ranks, dropout) LORA_EXPAND(LORA_JOIN, kind, shape, LORA_TYPE, ranks, dropout)

#define LORA_DEFINE(kind, Params, shape, ranks, dropout)                              \
  extern "C" __global__ void __launch_bounds__(shape::kThreads + kHopperCopying, 1)   \
      LORA_NAME(kind, shape, ranks, dropout)(const __grid_constant__ Params params) { \
    kind##_sm90<LORA_ELEMENT, shape, ranks, dropout>(params);                         \
  }
#define LORA_DEFINE_FORWARD(...) LORA_DEFINE(forward, HopperForwardParams, __VA_ARGS__)
#define LORA_DEFINE_BACKWARD(...) LORA_DEFINE(backward, HopperBackwardParams, __VA_ARGS__)

namespace lora_kernels {

LORA_EACH_HOPPER(LORA_DEFINE_FORWARD)
LORA_EACH_HOPPER(LORA_DEFINE_BACKWARD)

Kernels LORA_TABLE() {
#define LORA_STRING(name) #name
#define LORA_ENTRY(name) {LORA_STRING(name), reinterpret_cast<const void*>(&name)},
#define LORA_FORWARD_ENTRY(...) LORA_EXPAND(LORA_ENTRY, LORA_NAME(forward, __VA_ARGS__))
#define LORA_BACKWARD_ENTRY(...) LORA_EXPAND(LORA_ENTRY, LORA_NAME(backward, __VA_ARGS__))
  static const Kernel kernels[] = {LORA_EACH_HOPPER(LORA_FORWARD_ENTRY) LORA_EACH_HOPPER(LORA_BACKWARD_ENTRY)};
  return {kernels, sizeof kernels / sizeof *kernels};
}

}  // namespace lora_kernels

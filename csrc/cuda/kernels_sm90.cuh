// Kernels for sm_90a, of one 16-bit element type, and their table; as kernels_sm80.cuh.

#include "forward_sm90.cuh"
#include "kernels.h"

#define LORA_JOIN(type, ranks, dropout) lora_forward_Hopper_##type##_r##ranks##_d##dropout##_c1
#define LORA_EXPAND(macro, ...) macro(__VA_ARGS__)
#define LORA_NAME(ranks, dropout) LORA_EXPAND(LORA_JOIN, LORA_TYPE, ranks, dropout)

#define LORA_X(ranks, dropout)                                                                   \
  extern "C" __global__ void __launch_bounds__(Hopper::kThreads + kHopperCopying, 1)                   \
      LORA_NAME(ranks, dropout)(const __grid_constant__ HopperForwardParams params) {            \
    forward_sm90<LORA_ELEMENT, ranks, dropout>(params);                                          \
  }

namespace lora_kernels {

LORA_EACH_HOPPER(LORA_X)

#undef LORA_X

Kernels LORA_TABLE() {
#define LORA_STRING(name) #name
#define LORA_ENTRY(name) {LORA_STRING(name), reinterpret_cast<const void*>(&name)},
#define LORA_X(...) LORA_EXPAND(LORA_ENTRY, LORA_NAME(__VA_ARGS__))
  static const Kernel kernels[] = {LORA_EACH_HOPPER(LORA_X)};
  return {kernels, sizeof kernels / sizeof *kernels};
}

}  // namespace lora_kernels

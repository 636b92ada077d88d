// Which version of the kernels this processor runs.

#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if LORA_HAS_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lora_kernels {

namespace {

#if LORA_HAS_TILES
// Whether there is a matrix unit that Linux lets this process use: its registers are many, so a
// process has to ask (the kernel's Documentation/arch/x86/xstate.rst).
bool has_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24;  // amx-bf16, amx-tile; clang 14 has no names for them
  unsigned a, b, c, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kNeeded) == kNeeded &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const Kernels& best() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("LORA_KERNELS_TEST_ISA");
  const auto allowed = [wanted](const Kernels& k) { return !wanted || !std::strcmp(wanted, k.name); };
  const bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if LORA_HAS_TILES
  if (bf16 && allowed(amx_kernels) && has_tiles()) return amx_kernels;
#endif
  if (bf16 && allowed(avx512_bf16_kernels)) return avx512_bf16_kernels;
  if (avx512 && allowed(avx512_kernels)) return avx512_kernels;
  if (avx2 && allowed(avx2_kernels)) return avx2_kernels;
#endif
  return portable_kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = best();
  return chosen;
}

}  // namespace lora_kernels

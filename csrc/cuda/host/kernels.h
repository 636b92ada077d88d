// The table of compiled kernels: name and address of each, by source file.

#pragma once

namespace lora_kernels {

struct Kernel {
  const char* name;
  const void* address;
};

struct Kernels {
  const Kernel* first;
  int count;
};

Kernels bf16_kernels();
Kernels half_kernels();
Kernels float_kernels();
Kernels tf32_kernels();
Kernels bf16_kernels_sm90();
Kernels half_kernels_sm90();
Kernels codes_kernels();

}  // namespace lora_kernels

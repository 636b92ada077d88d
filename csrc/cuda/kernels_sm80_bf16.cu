// The kernels of kernels_sm80.cuh for bfloat16.

#define LORA_TYPE bf16
#define LORA_ELEMENT __nv_bfloat16
#define LORA_TABLE bf16_kernels
#define LORA_FORWARD LORA_EACH_FORWARD
#define LORA_BACKWARD LORA_EACH_BACKWARD
#define LORA_DECODE LORA_EACH_DECODE

#include "kernels_sm80.cuh"

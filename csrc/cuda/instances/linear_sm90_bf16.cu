// The kernels of linear_sm90.cuh for bfloat16.

#define LORA_TYPE bf16
#define LORA_ELEMENT __nv_bfloat16
#define LORA_TABLE bf16_kernels_sm90

#include "linear_sm90.cuh"

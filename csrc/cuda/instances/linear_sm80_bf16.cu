// The kernels of linear_sm80.cuh for bfloat16.

#define LORA_TYPE bf16
#define LORA_ELEMENT __nv_bfloat16
#define LORA_TABLE bf16_kernels
#define LORA_FORWARD LORA_EACH_FORWARD
#define LORA_BACKWARD LORA_EACH_BACKWARD
#define LORA_FEW_ROWS LORA_EACH_FEW_ROWS

#include "linear_sm80.cuh"

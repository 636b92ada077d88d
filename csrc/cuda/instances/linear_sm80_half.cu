// The kernels of linear_sm80.cuh for float16.

#define LORA_TYPE half
#define LORA_ELEMENT __half
#define LORA_TABLE half_kernels
#define LORA_FORWARD LORA_EACH_FORWARD
#define LORA_BACKWARD LORA_EACH_BACKWARD
#define LORA_FEW_ROWS LORA_EACH_FEW_ROWS

#include "linear_sm80.cuh"

// The kernels of linear_sm80.cuh for float32 whose products may be TF32's.

#define LORA_TYPE tf32
#define LORA_ELEMENT Tf32
#define LORA_TABLE tf32_kernels
#define LORA_FORWARD LORA_EACH_FORWARD_TF32
#define LORA_BACKWARD LORA_EACH_BACKWARD_TF32
#define LORA_FEW_ROWS LORA_EACH_FEW_ROWS

#include "linear_sm80.cuh"

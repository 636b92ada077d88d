// The kernels of linear_sm80.cuh for float32.

#define LORA_TYPE float
#define LORA_ELEMENT float
#define LORA_TABLE float_kernels
#define LORA_FORWARD LORA_EACH_FORWARD_FLOAT
#define LORA_BACKWARD LORA_EACH_BACKWARD_FLOAT
#define LORA_FEW_ROWS LORA_EACH_FEW_ROWS

#include "linear_sm80.cuh"

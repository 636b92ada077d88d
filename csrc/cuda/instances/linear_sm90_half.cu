// The kernels of linear_sm90.cuh for float16.

#define LORA_TYPE half
#define LORA_ELEMENT __half
#define LORA_TABLE half_kernels_sm90

#include "linear_sm90.cuh"

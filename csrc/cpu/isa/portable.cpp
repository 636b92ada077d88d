// The kernels for any processor.

#include "../kernels.h"

#define LORA_WIDTH 4
#define LORA_PAIRS 0
#define LORA_TILES 0
#include "../kernels/all.inc"
const lora_kernels::Kernels lora_kernels::portable_kernels = table_of("portable");

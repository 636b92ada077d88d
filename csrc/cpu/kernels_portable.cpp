// The kernels for any processor.

#include "kernels.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "compiler.h"

#define LORA_WIDTH 4
#define LORA_PAIRS 0
#define LORA_TILES 0

namespace lora_kernels {

#include "simd.inc"

#include "panels.inc"
#include "philox.inc"
#include "tiles.inc"
#include "products.inc"

#include "few_rows.inc"
#include "sums.inc"

#include "table.inc"

const Kernels portable_kernels = table_of("portable");

}  // namespace lora_kernels

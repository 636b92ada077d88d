// The library's products: MKL's or oneDNN's, whichever is faster here.

#pragma once

#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace lora_kernels {

// For how many rows the package's own products are faster than the library's.
struct OwnRows {
  int64_t least, most, most_beside_tiles;
  bool holds(int64_t rows) const { return least <= rows && rows <= (kernels().has_tiles ? most_beside_tiles : most); }
};

// v factor + bias: v [M, L], factor [L, C].
Tensor library_product(const Tensor& v, const Tensor& factor, const OptionalTensor& bias);

// The same, written to C columns of `out` from `column` on; rounded where `out` has another type than v.
void write_library_product(
    const Tensor& out, int64_t column, const Tensor& v, const Tensor& factor, const OptionalTensor& bias);

// x wT + bias by the call that torch's own layer makes, bit for bit.
Tensor torch_linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias);

// x wT + bias by oneDNN, for w [C, L] packed in parts of L.
Tensor packed_linear(const Tensor& x, const std::vector<Tensor>& parts, const OptionalTensor& bias);

}  // namespace lora_kernels

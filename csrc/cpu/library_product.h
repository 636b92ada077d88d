// The library's products: MKL's or oneDNN's, whichever is faster here.

#pragma once

#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace lora_kernels {

// For how many rows the package's own products are faster than the library's, which may have a matrix unit.
struct OwnRows {
  struct Range {
    int64_t least, most;
  } usually, beside_tiles;

  bool holds(int64_t rows) const {
    const Range& range = kernels().has_tiles ? beside_tiles : usually;
    return range.least <= rows && rows <= range.most;
  }
};

// Those for v's type, one of two.
inline OwnRows own_rows(const Tensor& v, const OwnRows& of_bf16, const OwnRows& of_float) {
  return v.scalar_type() == ScalarType::BFloat16 ? of_bf16 : of_float;
}

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

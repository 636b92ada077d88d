// See codes.h; the sizes of all parts were checked with the call (csrc/common/weight.h).

#include "codes.h"

#include <torch/csrc/stable/ops.h>

#include <bit>

namespace lora_kernels {

CodedWeight coded(const Weight& weight, Target& target) {
  CodedWeight w{{torch::stable::contiguous(weight.matrix)}, {}, Store::kFlat};
  for (const Tensor& part : *weight.parts) w.tensors.push_back(torch::stable::contiguous(part));
  for (const Tensor& t : w.tensors) target.reads(t);
  const auto floats = [&](size_t which) { return static_cast<const float*>(w.tensors[which].const_data_ptr()); };
  Codes& c = w.codes;
  c.bytes = static_cast<const uint8_t*>(w.tensors[0].const_data_ptr());
  c.absmax = w.tensors[1].const_data_ptr();
  c.code = floats(2);
  if (w.tensors.size() > 3) {
    w.store = Store::kNested;
    c.nested_code = floats(3), c.nested_absmax = floats(4), c.nested_offset = floats(5);
  }
  c.log_block = std::countr_zero(static_cast<uint64_t>(weight.numbers[0]));
  c.in_chunks = reinterpret_cast<uintptr_t>(c.bytes) % 16 == 0 && weight.k % 32 == 0;
  return w;
}

Tensor decoded(const CodedWeight& weight, int64_t n, int64_t k, const Tensor& v, Type type, Target& target) {
  const Launch how = decode_plan(n * k, type, weight.store);
  const Tensor w = target.empty(v, {n, k});
  const DecodeParams params{weight.codes, w.mutable_data_ptr(), n * k};
  target.launch(how, &params, sizeof params);
  return w;
}

}  // namespace lora_kernels

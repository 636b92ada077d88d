// The library's products: MKL's or oneDNN's, whichever is faster here.

#include "library_product.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cstring>

#include "parallel.h"

// Where torch was built with oneDNN; its header can't be included beside the stable ABI.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* activation,
    const double** scalars, int64_t scalar_count, const char** algorithm, AtenTensorHandle* out);

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise_binary(
    AtenTensorHandle x, AtenTensorHandle other, AtenTensorHandle weight, AtenTensorHandle* bias,
    const char* activation, AtenTensorHandle* out);

namespace lora_kernels {

namespace {

constexpr int64_t kOnednnRows = 4, kOnednnWork = 1 << 20;
// As lora_kernels/operands/onednn.py and impl/eager/onednn.py have them, with their reasons.
constexpr int64_t kOnednnChain = 1024, kRowsToCopyFor = 64;

// Whether this torch has oneDNN's products; a weak symbol that isn't there is null.
bool has_onednn() { return aoti_torch_cpu__linear_pointwise && aoti_torch_cpu__linear_pointwise_binary; }

// Whether w [C, L] is summed in parts of L that have to be copied, since its rows lie apart.
bool copied_in_parts(const Tensor& w) {
  return w.scalar_type() == ScalarType::Float && w.size(1) > kOnednnChain && w.stride(0) != 1;
}

bool is_amd_with_avx512() {
#if defined(__x86_64__)
  static const bool is = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f");
  return is;
#else
  return false;
#endif
}

// Whether oneDNN's float32 product v wT is the faster one: on AMD processors with AVX-512, from some
// work on. 2026-11: Zen 4, 0.6 to 0.9 of MKL's time from 1024 columns up, as much as it at 768; Zen 5,
// 0.4 to 0.9 of it from 2^20 multiplications on, whatever the shape; for one row 0.9 forward, 2.2 backward.
// Zen 3, which has AVX2 alone: 1.03 to 1.8.
bool prefers_onednn(const Tensor& v, const Tensor& w) {
  return is_amd_with_avx512() && has_onednn() && v.scalar_type() == ScalarType::Float &&
         v.size(0) >= (copied_in_parts(w) ? kRowsToCopyFor : kOnednnRows) &&
         v.size(0) * w.size(0) * w.size(1) >= kOnednnWork;
}

Tensor columns(Tensor t, int64_t start, int64_t length) { return torch::stable::narrow(t, 1, start, length); }

// sum + x wT + bias by oneDNN, w [C, L] as it stands or packed; sum and bias may be absent.
Tensor onednn_part(const OptionalTensor& sum, const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  STD_TORCH_CHECK(has_onednn(), "parts: this torch was built without oneDNN");
  AtenTensorHandle out, added = bias ? bias->get() : nullptr;
  AtenTensorHandle* const bias_given = bias ? &added : nullptr;
  const char* algorithm = "";
  TORCH_ERROR_CODE_CHECK(
      sum ? aoti_torch_cpu__linear_pointwise_binary(x.get(), sum->get(), w.get(), bias_given, "add", &out)
          : aoti_torch_cpu__linear_pointwise(x.get(), w.get(), bias_given, "none", nullptr, 0, &algorithm, &out));
  return Tensor(out);
}

// x wT + bias by oneDNN, for w [C, L] as it stands; one part's copy at a time.
Tensor onednn_linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  const int64_t depth = w.size(1), parts = std::max<int64_t>(1, (depth + kOnednnChain - 1) / kOnednnChain);
  if (parts == 1) return onednn_part(std::nullopt, x, w, bias);
  OptionalTensor sum;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t start = depth * i / parts, length = depth * (i + 1) / parts - start;
    const Tensor part = columns(w, start, length);
    sum = onednn_part(sum, columns(x, start, length),
                      copied_in_parts(w) ? torch::stable::contiguous(part) : part, sum ? std::nullopt : bias);
  }
  return *sum;
}

void product_into(const Tensor& out, const Tensor& v, const Tensor& factor, const OptionalTensor& bias) {
  TORCH_ERROR_CODE_CHECK(
      bias ? aoti_torch_cpu_addmm_out(out.get(), bias->get(), v.get(), factor.get(), 1, 1)
           : aoti_torch_cpu_mm_out(out.get(), v.get(), factor.get()));
}

}  // namespace

Tensor torch_linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  const Tensor out = empty_matrix(x.size(0), w.size(0), x.scalar_type());
  product_into(out, x, transposed(w), bias);
  return out;
}

Tensor packed_linear(const Tensor& x, const std::vector<Tensor>& parts, const OptionalTensor& bias) {
  OptionalTensor sum;
  int64_t start = 0;
  for (const Tensor& part : parts) {
    const int64_t length = part.size(1);
    const Tensor v = parts.size() == 1 ? x : columns(x, start, length);
    sum = onednn_part(sum, v, part, sum ? std::nullopt : bias);
    start += length;
  }
  return *sum;
}

Tensor library_product(const Tensor& v, const Tensor& factor, const OptionalTensor& bias) {
  const Tensor w = transposed(factor);
  if (prefers_onednn(v, w)) return onednn_linear(v, w, bias);
  const Tensor out = empty_matrix(v.size(0), factor.size(1), v.scalar_type());
  product_into(out, v, factor, bias);
  return out;
}

void write_library_product(
    const Tensor& out, int64_t column, const Tensor& v, const Tensor& factor, const OptionalTensor& bias) {
  const int64_t width = factor.size(1);
  const bool rounds = out.scalar_type() != v.scalar_type();
  if (!rounds && !prefers_onednn(v, transposed(factor)))
    return product_into(columns(out, column, width), v, factor, bias);
  // oneDNN's results are new tensors, and so is what is rounded.
  const Tensor product = library_product(v, factor, bias);
  const Tensor made = rounds ? torch::stable::to(product, out.scalar_type()) : product;
  const auto bytes = static_cast<int64_t>(out.element_size()), by_row = out.stride(0) * bytes;
  char* const to = static_cast<char*>(out.mutable_data_ptr()) + column * bytes;
  const char* const from = static_cast<const char*>(made.const_data_ptr());
  in_parallel(out.size(0), kRowGroup, width, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * by_row, from + i * width * bytes, width * bytes);
  });
}

}  // namespace lora_kernels

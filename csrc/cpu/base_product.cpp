// The products with the frozen weight: the library's, but for a few rows, where it leaves most of the
// memory's bandwidth unused.

#include "base_product.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <functional>

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

struct Rows {
  int64_t least, most, most_beside_tiles;
};

// For how many rows the package's own products are faster. 2026-11-24, Zen 5, one thread, 2048x2048
// out of cache: forward 0.54 of the library's time for 1 row and 0.84 for 16 (bfloat16), 0.73 for 1
// and 0.91 for 4 (float32); dy W 0.55 for 16 and 0.67 for 32, 0.65 for 16 and 0.86 for 64. 2026-11-26,
// Xeon, whose matrix unit the library takes, bfloat16, one and two threads: forward 0.4 to 0.7 for 1
// row, 0.6 to 0.9 for 4, 1.6 to 2.4 for 16; dy W 0.4 to 0.9 for 1, 0.5 to 0.8 for 16, 0.9 to 1.4 for 24.
constexpr Rows kForwardBf16{1, 16, 4}, kForwardFloat{1, 4, 4}, kBackwardBf16{1, 32, 16}, kBackwardFloat{4, 64, 64};
// x times a weight stored as [K, N]. 2026-11-29, Zen 3: 0.06 to 0.5 of the library's time in bfloat16, 0.95 to 1.5 in
// float32.
constexpr Rows kStoredBf16 = kBackwardBf16, kStoredFloat{1, 0, 0};

constexpr int64_t kOnednnRows = 4, kOnednnWork = 1 << 20;
// As lora_kernels/operands/onednn.py and impl/eager/onednn.py have them, with their reasons.
constexpr int64_t kOnednnChain = 1024, kRowsToCopyFor = 64;

// Whether this torch has oneDNN's products; a weak symbol that isn't there is null.
bool has_onednn() { return aoti_torch_cpu__linear_pointwise && aoti_torch_cpu__linear_pointwise_binary; }

// Whether w [C, L] is summed in parts of L that have to be copied, since its rows lie apart.
bool copied_in_parts(const Tensor& w) {
  return w.scalar_type() == ScalarType::Float && w.size(1) > kOnednnChain && w.stride(0) != 1;
}

bool within(const Tensor& v, const Tensor& weight, Rows of_bf16, Rows of_float) {
  const Rows rows = v.scalar_type() == ScalarType::BFloat16 ? of_bf16 : of_float;
  const int64_t most = kernels().has_tiles ? rows.most_beside_tiles : rows.most;
  return rows.least <= v.size(0) && v.size(0) <= most && weight.size(0) >= kRowGroup;
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

// x wT + bias by oneDNN, for w [C, L] packed in parts of L.
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

// The same for w as it stands; one part's copy at a time.
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

// v factor + bias by the library: v [M, L], factor [L, C].
Tensor product(const Tensor& v, const Tensor& factor, const OptionalTensor& bias) {
  const Tensor w = transposed(factor);
  if (prefers_onednn(v, w)) return onednn_linear(v, w, bias);
  const Tensor out = empty_matrix(v.size(0), factor.size(1), v.scalar_type());
  TORCH_ERROR_CODE_CHECK(
      bias ? aoti_torch_cpu_addmm_out(out.get(), bias->get(), v.get(), factor.get(), 1, 1)
           : aoti_torch_cpu_mm_out(out.get(), v.get(), factor.get()));
  return out;
}

// Whether the columns of w are what lies adjacent in memory, as in the view of a weight stored as [K, N].
bool by_columns(const Tensor& w) { return w.size(1) > 1 && w.stride(1) != 1 && w.stride(0) == 1; }

// v wT + bias, for w with adjacent rows.
Tensor times_transposed(const Tensor& v, const Tensor& w, const OptionalTensor& bias) {
  if (!within(v, w, kForwardBf16, kForwardFloat)) return product(v, transposed(w), bias);
  const int64_t m = v.size(0), n = w.size(0);
  const Tensor y = empty_matrix(m, n, v.scalar_type());
  const OptionalTensor added = bias ? OptionalTensor(torch::stable::contiguous(*bias)) : std::nullopt;
  const Matrix from = added ? row_matrix(*added) : Matrix{};
  in_parallel(n, kRowGroup, m * w.size(1), [&](int64_t begin, int64_t end) {
    kernels().few_rows(matrix(v), matrix(w), from, matrix(y), begin, end);
  });
  return y;
}

// v w + bias, for w with adjacent rows; by the package's own products for as many rows of v as are named.
Tensor times(const Tensor& v, const Tensor& w, const OptionalTensor& bias, Rows of_bf16, Rows of_float) {
  if (!within(v, w, of_bf16, of_float)) return product(v, w, bias);
  const int64_t m = v.size(0), n = w.size(1), stride = round_up(m, kLanes);
  const Buffer<float> columns = to_columns(v, stride);
  const Sums sums(stride, n);
  column_sums(w, {columns.get(), stride}, sums);
  if (bias) {
    const Buffer<float> added = padded_floats(torch::stable::reshape(*bias, {1, n}), n);
    for (int64_t i = 0; i < m; ++i) {
      float* const to = sums.data.get() + i * sums.pitch;
      std::transform(to, to + n, added.get(), to, std::plus<>());
    }
  }
  return sums.as_rows(m, v, 1);
}

}  // namespace

void check_parts(const Parts& parts, int64_t rows, int64_t columns, const Tensor& like) {
  if (!parts) return;
  int64_t sum = 0;
  for (const Tensor& part : *parts) {
    STD_TORCH_CHECK(
        part.dim() == 2 && part.size(0) == rows && part.scalar_type() == like.scalar_type(),
        "parts: expected tensors of ", rows, " rows in the dtype of the other tensors");
    sum += part.size(1);
  }
  STD_TORCH_CHECK(sum == columns, "parts: expected ", columns, " columns in all, got ", sum);
}

Tensor base_forward(const Tensor& x, const LinearCall& call) {
  const auto& [w, parts, format] = call.weight;
  // Few rows of float32 take 0.6 to 0.8 of the time that they take with a packed weight, and err half
  // as much; of bfloat16 0.7 to 1.2. 2026-11-26, Xeon, three sizes. Not where W would be copied.
  const bool beats_packed =
      within(x, w, kForwardBf16, kForwardFloat) && x.scalar_type() == ScalarType::Float && w.stride(1) == 1;
  if (parts && x.size(0) > 0 && !beats_packed) return packed_linear(x, *parts, call.bias);
  if (by_columns(w)) return times(x, transposed(w), call.bias, kStoredBf16, kStoredFloat);
  return times_transposed(x, as_matrix(w), call.bias);
}

Tensor base_backward(const Tensor& dy, const Weight& weight) {
  const auto& [w, parts, format] = weight;
  if (parts && dy.size(0) > 0) return packed_linear(dy, *parts, std::nullopt);
  if (by_columns(w)) return times_transposed(dy, transposed(w), std::nullopt);
  return times(dy, as_matrix(w), std::nullopt, kBackwardBf16, kBackwardFloat);
}

}  // namespace lora_kernels

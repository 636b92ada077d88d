// The products with a frozen weight that is kept as codes. Forward decodes panels of its rows, backward of its columns, so that
// no sum is parted, into memory that stays in cache beside the library's GEMM. Few rows of x or dy take each thread's own panels.

#include "quantised_product.h"

#include <algorithm>

#include "library_product.h"
#include "parallel.h"

namespace lora_kernels {

namespace {

constexpr int64_t kPanelBytes = 2 << 20;
constexpr int64_t kLeastPanel = 64;  // rows or columns of W: fewer waste the library's tiles
constexpr int64_t kDecodeWork = 4;   // multiplications that take the time of decoding a number

// 2026-11-29, Zen 3, float32, 2048x2048: forward 16 rows take 0.8 to 0.9 of what 17 take by panels; dy W as much as with a dense
// W. 2026-12-01, Xeon, bfloat16, 2048x2048 and 4096x4096, both by the matrix unit: forward 0.55 to 0.6 of the time by panels for
// 1 to 16 rows, 0.8 for 128, 1.06 for 256; dy W 0.7 for 1 to 16, 0.9 for 32, 1.1 for 128. By pairs alone forward 0.6 for 1 row,
// 0.8 for 16; dy W 1.4 for 1, 1.2 for 4, 0.8 for 16, 0.9 for 32. There in float32 forward 0.5 for 16 rows, 0.6 to 0.8 for 32; dy W
// 1.0 to 1.3 for 4 to 32.
constexpr OwnRows kForwardBf16{{1, 16}, {1, 192}}, kForwardFloat{{1, 16}, {1, 32}};
constexpr OwnRows kBackwardBf16{{8, 32}, {1, 64}}, kBackwardFloat{{4, 32}, {1, 0}};
constexpr int64_t kStrip = 256;  // columns of W, of few rows of dy, that a thread takes at a time

// Codes beside the tensors that they are views of, or of which they are copies.
struct Held {
  std::vector<Tensor> tensors;
  Codes codes{};

  template <class T>
  const T* data(const Tensor& t) {
    tensors.push_back(torch::stable::contiguous(t));
    return static_cast<const T*>(tensors.back().const_data_ptr());
  }
};

void hold_codebook(const Weight& weight, Held& held) {
  const std::vector<Tensor>& parts = *weight.parts;
  Codes& codes = held.codes;
  codes.kind = Codes::kFourBits;
  codes.block_columns = weight.numbers[0];
  codes.numbers = held.data<float>(parts[1]);
  if (parts.size() == 2) {
    codes.scales = held.data<float>(parts[0]);
    return;
  }
  codes.nested = held.data<uint8_t>(parts[0]);
  codes.nested_numbers = held.data<float>(parts[2]);
  codes.scales = held.data<float>(parts[3]);
  codes.offset = *held.data<float>(parts[4]);
}

void hold_scaled(const Weight& weight, Held& held) {
  Codes& codes = held.codes;
  codes.kind = weight.format == "int8" ? Codes::kInt8 : Codes::kFloat8;
  codes.stride = weight.k;
  codes.block_rows = weight.numbers[0], codes.block_columns = weight.numbers[1];
  const Tensor scales = torch::stable::to((*weight.parts)[0], ScalarType::Float);
  if (weight.numbers[2] == 1) {
    codes.scales = held.data<float>(scales);
    return;
  }
  // Each is rounded before it is a factor.
  const float factor = static_cast<float>(1.0 / static_cast<double>(weight.numbers[2]));
  const Tensor rounded = empty_matrix(1, scales.numel(), ScalarType::Float);
  const float* const from = held.data<float>(scales);
  std::transform(from, from + scales.numel(), static_cast<float*>(rounded.mutable_data_ptr()),
                 [=](float scale) { return scale * factor; });
  codes.scales = held.data<float>(rounded);
}

// W as the kernels read it, rounded to the type of v.
Held held(const Weight& weight, const Tensor& v) {
  Held made;
  made.codes.data = made.data<uint8_t>(weight.matrix);
  made.codes.rows = weight.n, made.codes.columns = weight.k;
  made.codes.rounds_to_bf16 = v.scalar_type() == ScalarType::BFloat16;
  weight.has_four_bits() ? hold_codebook(weight, made) : hold_scaled(weight, made);
  return made;
}

Tensor as_type(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

// v as it is multiplied: without products of bfloat16 pairs, as float32. 2026-11-29, Zen 3, 16 rows: the library's products of
// bfloat16 take 5 times the time of those of float32 for x WT, 100 times for dy W.
Tensor multiplied(const Tensor& v) {
  return kernels().has_pairs ? v : as_type(v, ScalarType::Float);
}

OptionalTensor multiplied(const OptionalTensor& bias) {
  OptionalTensor same = bias;
  if (bias) same = multiplied(*bias);
  return same;
}

// Rows or columns of W in a panel, of `length` numbers each.
int64_t panel_of(int64_t length, const Tensor& v) {
  const int64_t bytes = length * static_cast<int64_t>(v.element_size());
  return std::max(kLeastPanel, kPanelBytes / bytes / kLeastPanel * kLeastPanel);
}

void decode(const Codes& codes, int64_t row, int64_t column, const Tensor& out) {
  const Matrix all = matrix(out);
  const int64_t bytes = static_cast<int64_t>(out.element_size());
  in_parallel(all.rows, 1, kDecodeWork * all.columns, [&](int64_t begin, int64_t end) {
    char* const to = static_cast<char*>(all.data) + begin * all.stride * bytes;
    kernels().decode(codes, row + begin, column, {to, all.stride, end - begin, all.columns, all.is_bf16});
  });
}

Tensor part_of(Tensor t, int64_t first, int64_t length) { return torch::stable::narrow(t, 0, first, length); }

// x WT + bias by panels of W's rows.
void forward_by_panels(const Codes& codes, const Tensor& x, const OptionalTensor& bias, const Tensor& y) {
  const int64_t step = std::min(panel_of(codes.columns, x), codes.rows);
  const Tensor panel = empty_matrix(step, codes.columns, x.scalar_type());
  for (int64_t n = 0; n < codes.rows; n += step) {
    const int64_t rows = std::min(step, codes.rows - n);
    const Tensor w = part_of(panel, 0, rows);
    decode(codes, n, 0, w);
    const OptionalTensor added = bias ? OptionalTensor(part_of(*bias, n, rows)) : std::nullopt;
    write_library_product(y, n, x, transposed(w), added);
  }
}

// dy W by panels of W's columns, in a type.
Tensor backward_by_panels(const Codes& codes, const Tensor& dy, ScalarType type) {
  const Tensor dx = empty_matrix(dy.size(0), codes.columns, type);
  const int64_t step = std::min(panel_of(codes.rows, dy), codes.columns);
  const Tensor panel = empty_matrix(codes.rows, step, dy.scalar_type());
  for (int64_t k = 0; k < codes.columns; k += step) {
    const int64_t columns = std::min(step, codes.columns - k);
    // The last one's rows lie together too: memory is asked for once, since new pages cost more than decoding.
    const Tensor w = columns == step ? panel : empty_matrix(codes.rows, columns, dy.scalar_type());
    decode(codes, 0, k, w);
    write_library_product(dx, k, dy, w, std::nullopt);
  }
  return dx;
}

void few_rows_forward(const Codes& codes, const Tensor& x, const OptionalTensor& bias, const Tensor& y) {
  const OptionalTensor added = bias ? OptionalTensor(torch::stable::contiguous(*bias)) : std::nullopt;
  const Matrix from = added ? row_matrix(*added) : Matrix{};
  in_parallel(codes.rows, kRowGroup, (x.size(0) + kDecodeWork) * codes.columns, [&](int64_t begin, int64_t end) {
    kernels().few_rows_of_codes(matrix(x), codes, from, matrix(y), begin, end);
  });
}

// dy W, each thread by columns of W of its own.
Tensor few_rows_backward(const Codes& codes, const Tensor& dy) {
  const int64_t m = dy.size(0), n = codes.rows, k = codes.columns, stride = round_up(m, kLanes);
  const Buffer<float> q = to_columns(dy, stride);
  const Sums sums(stride, k);
  const bool is_bf16 = dy.scalar_type() == ScalarType::BFloat16;
  in_parallel(k, kStrip, (stride + kDecodeWork) * n, [&](int64_t begin, int64_t end) {
    kernels().column_sums_of_codes(codes, q.get(), stride, sums.data.get(), sums.pitch, is_bf16, begin, end);
  });
  return sums.as_rows(m, dy, 1);
}

}  // namespace

Tensor quantised_forward(const Tensor& x, const Weight& weight, const OptionalTensor& bias) {
  const Held w = held(weight, x);
  const Tensor v = multiplied(x);
  const bool few = own_rows(v, kForwardBf16, kForwardFloat).holds(x.size(0));
  // Of many rows each panel's columns are rounded at once: y isn't held in float32.
  const Tensor y = empty_matrix(x.size(0), weight.n, few ? v.scalar_type() : x.scalar_type());
  const OptionalTensor added = multiplied(bias);
  few ? few_rows_forward(w.codes, v, added, y) : forward_by_panels(w.codes, v, added, y);
  return as_type(y, x.scalar_type());
}

Tensor quantised_backward(const Tensor& dy, const Weight& weight) {
  const Held w = held(weight, dy);
  const Tensor v = multiplied(dy);
  const bool few = own_rows(v, kBackwardBf16, kBackwardFloat).holds(v.size(0));
  return few ? as_type(few_rows_backward(w.codes, v), dy.scalar_type())
             : backward_by_panels(w.codes, v, dy.scalar_type());
}

}  // namespace lora_kernels

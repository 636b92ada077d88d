// The adapted linear layer on CPUs: lora_kernels::lora_linear_{forward,backward}_cpu.
//
// Schemas and documentation stand in lora_kernels/ops/linear.py. GEMMs with the weight are the library's
// (base_product.cpp); the low-rank products, dropout inside, are those of products.inc. Beyond its
// outputs a call holds the factors and [M, R] numbers.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../common/arguments.h"
#include "base_product.h"
#include "parallel.h"

namespace lora_kernels {

namespace {

Dropout dropout_of(const OptionalTensor& seed, int64_t columns, int64_t threshold) {
  if (!seed) return {};
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  return {columns, key, static_cast<uint32_t>(threshold)};
}

float keep_scale(const Dropout& dropout) {
  return 65536.0f / static_cast<float>(65536 - dropout.threshold);
}

float scale_of(const OptionalTensor& tensor, double number) {
  if (!tensor) return static_cast<float>(number);
  const Tensor value = torch::stable::to(*tensor, ScalarType::Float);
  return *static_cast<const float*>(value.const_data_ptr());
}

std::tuple<Tensor, Tensor> forward(
    Tensor x, Tensor weight, Parts parts, arguments::Format format, Tensor lora_A, Tensor lora_B, OptionalTensor bias,
    OptionalTensor seed, int64_t threshold, OptionalTensor scaling_tensor, double scaling) {
  arguments::check_format(format, parts, {"dense", "onednn"});
  arguments::check_forward(x, weight, lora_A, lora_B, bias, seed, scaling_tensor, threshold);
  check_parts(parts, weight.size(0), weight.size(1), x);
  const Tensor rows = left_operand(x), a = factor(lora_A, x), b = factor(lora_B, x);
  const int64_t m = rows.size(0), n = weight.size(0), k = weight.size(1), r = a.size(0);
  const Tensor y = base_forward(rows, weight, bias, parts);
  const Tensor xa = empty_matrix(m, r, x.scalar_type());
  const Dropout dropout = dropout_of(seed, k, threshold);
  const float scale = scale_of(scaling_tensor, scaling);
  const Kernels& kernel = kernels();
  const Panel over_k = kernel.panel_over_columns(matrix(a)), over_r = kernel.panel_over_columns(matrix(b));
  const Buffer<float> q(m * over_k.pitch);
  in_parallel(m, kRowGroup, r * (k + n), [&](int64_t begin, int64_t end) {
    kernel.rows_product(matrix(rows), over_k, keep_scale(dropout), q.get(), dropout, begin, end);
    write_rows(q.get(), over_k.pitch, xa, begin, end);
    std::for_each(q.get() + begin * over_k.pitch, q.get() + end * over_k.pitch, [=](float& v) { v *= scale; });
    kernel.add_low_rank(matrix(y), over_r, q.get(), over_k.pitch, begin, end);
  });
  return {shaped_like(x, y), xa};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dy, OptionalTensor x, OptionalTensor xa, Tensor weight, Parts parts, arguments::Format format, Tensor lora_A,
    Tensor lora_B, OptionalTensor seed, int64_t threshold, OptionalTensor scaling_tensor, double scaling,
    std::vector<bool> wanted) {
  arguments::check_format(format, parts, {"dense", "onednn"});
  arguments::check_backward(dy, x, xa, weight, lora_A, lora_B, seed, scaling_tensor, threshold, wanted);
  check_parts(parts, weight.size(1), weight.size(0), dy);
  const bool need_dx = wanted[0], need_da = wanted[1], need_db = wanted[2], need_dbias = wanted[3];
  const Tensor rows = left_operand(dy);
  const int64_t m = rows.size(0), n = weight.size(0), k = weight.size(1), r = lora_A.size(0);
  const int64_t stride = round_up(r, kLanes);
  const float scale = scale_of(scaling_tensor, scaling);
  const Dropout dropout = dropout_of(seed, k, threshold);
  // An empty tensor stands for a gradient not asked for; none is another's alias.
  const auto empty = [&] { return torch::stable::new_empty(dy, {0}); };
  Tensor dx = empty(), da = empty(), db = empty(), dbias = empty();
  if (need_dx) dx = base_backward(rows, weight, parts);
  if (need_dx || need_da) {
    const Panel over_n = kernels().panel_over_rows(matrix(factor(lora_B, dy)));
    const Panel over_r = kernels().panel_over_rows(matrix(factor(lora_A, dy)));
    const Buffer<float> q(m * stride);
    in_parallel(m, kRowGroup, stride * n, [&](int64_t begin, int64_t end) {
      kernels().rows_product(matrix(rows), over_n, scale * keep_scale(dropout), q.get(), {}, begin, end);
    });
    const OptionalTensor into = need_dx ? OptionalTensor(dx) : std::nullopt;
    const OptionalTensor from = need_da ? OptionalTensor(as_matrix(*x)) : std::nullopt;
    const Sums sums(need_da ? stride : 0, k);
    column_pass(into, from, over_r, q.get(), stride, dropout, sums);
    if (need_da) da = sums.as_rows(r, lora_A, 1);
  }
  if (need_db) {
    const Buffer<float> q = padded_floats(*xa, stride);
    const Sums sums(stride, n);
    column_sums(rows, q.get(), stride, sums);
    db = sums.as_columns(r, lora_B, scale);
  }
  if (need_dbias) dbias = torch::stable::sum(rows, std::vector<int64_t>{0});
  if (need_dx) dx = shaped_like(dy, dx);
  return {dx, da, db, dbias};
}

std::string cpu_isa() { return kernels().name; }

}  // namespace

}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&lora_kernels::cpu_isa));
}

// A packed weight is a tensor of another layout, which the dispatcher takes for another backend.
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("lora_linear_forward_cpu", TORCH_BOX(&lora_kernels::forward));
  m.impl("lora_linear_backward_cpu", TORCH_BOX(&lora_kernels::backward));
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, MkldnnCPU, m) {
  m.impl("lora_linear_forward_cpu", TORCH_BOX(&lora_kernels::forward));
  m.impl("lora_linear_backward_cpu", TORCH_BOX(&lora_kernels::backward));
}

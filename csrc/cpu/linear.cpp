// The adapted linear layer on CPUs: lora_kernels::lora_linear_{forward,backward}_cpu.
//
// Schemas and documentation stand in lora_kernels/ops/linear.py. GEMMs with the weight are the library's
// (base_product.cpp), with a quantised one panel by panel (quantised_product.cpp); the low-rank products,
// dropout inside, are those of products.inc. Beyond its outputs a call holds the factors, [M, R] numbers
// and a panel of a quantised weight.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "../common/call.h"
#include "base_product.h"
#include "branch.h"
#include "parallel.h"

namespace lora_kernels {

namespace {

constexpr std::array kFormats{"dense", "onednn", "nf4", "fp4", "int8", "float8"};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const LinearCall& call) {
  check_packed(call.weight, call.n(), call.k(), x);
  const Tensor rows = left_operand(x), a = factor(call.adapter.a, x), b = factor(call.adapter.b, x);
  const int64_t m = rows.size(0), r = call.r();
  const Tensor y = base_forward(rows, call);
  const Tensor xa = empty_matrix(m, r, x.scalar_type());
  if (r == 0) return {shaped_like(x, y), xa};
  const Mask mask = mask_of(call);
  const float scale = scale_of(call.adapter);
  const Kernels& kernel = kernels();
  const Panel over_k = kernel.panel_over_columns(matrix(a)), over_r = kernel.panel_over_columns(matrix(b));
  const Buffer<float> q(m * over_k.pitch);
  in_parallel(m, kRowGroup, r * (call.k() + call.n()), [&](int64_t begin, int64_t end) {
    kernel.rows_product(matrix(rows), over_k, keep_scale(mask), q.get(), mask, begin, end);
    write_rows(q.get(), over_k.pitch, xa, begin, end);
    std::for_each(q.get() + begin * over_k.pitch, q.get() + end * over_k.pitch, [=](float& v) { v *= scale; });
    kernel.add_low_rank(matrix(y), over_r, q.get(), over_k.pitch, begin, end);
  });
  return {shaped_like(x, y), xa};
}

Gradients backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& xa, const LinearCall& call, const Wanted& wanted) {
  check_packed(call.weight, call.k(), call.n(), dy);
  const Tensor rows = left_operand(dy);
  const auto empty = [&] { return torch::stable::new_empty(dy, {0}); };
  Gradients gradients{empty(), empty(), empty(), empty()};
  if (wanted.dx) gradients.dx = base_backward(rows, call.weight);
  const bool adapted = call.r() > 0;
  if (adapted && (wanted.dx || wanted.da)) gradients.da = add_adapter(gradients.dx, rows, x, call, wanted);
  if (adapted && wanted.db) {
    const int64_t stride = round_up(call.r(), kLanes);
    const Buffer<float> q = padded_floats(*xa, stride);
    const Sums sums(stride, call.n());
    column_sums(rows, {q.get(), stride}, sums);
    gradients.db = sums.as_columns(call.r(), call.adapter.b, scale_of(call.adapter));
  }
  if (wanted.dbias) gradients.dbias = torch::stable::sum(rows, std::vector<int64_t>{0});
  if (wanted.dx) gradients.dx = shaped_like(dy, gradients.dx);
  return gradients;
}

std::string cpu_isa() { return kernels().name; }

}  // namespace

}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&lora_kernels::cpu_isa));
}

// A packed weight is a tensor of another layout, which the dispatcher takes for another backend.
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("lora_linear_forward_cpu", TORCH_BOX((&lora_kernels::forward_operator<lora_kernels::forward, lora_kernels::kFormats>)));
  m.impl("lora_linear_backward_cpu", TORCH_BOX((&lora_kernels::backward_operator<lora_kernels::backward, lora_kernels::kFormats>)));
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, MkldnnCPU, m) {
  m.impl("lora_linear_forward_cpu", TORCH_BOX((&lora_kernels::forward_operator<lora_kernels::forward, lora_kernels::kFormats>)));
  m.impl("lora_linear_backward_cpu", TORCH_BOX((&lora_kernels::backward_operator<lora_kernels::backward, lora_kernels::kFormats>)));
}

// The adapted linear layer on CPUs: lora_kernels::lora_linear_{forward,backward}_cpu.
//
// Schemas and documentation stand in lora_kernels/ops/linear.py. GEMMs with the weight are the library's
// (base_product.cpp), with a quantised one panel by panel (quantised_product.cpp); the low-rank products,
// dropout inside, are those of products.inc. Beyond its outputs a call holds the factors, [M, R] numbers
// and a panel of a quantised weight.

#include <torch/csrc/stable/library.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "../common/call.h"
#include "base_product.h"
#include "branch.h"

namespace lora_kernels {

namespace {

constexpr std::array kFormats{"dense", "onednn", "nf4", "fp4", "int8", "float8"};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const LinearCall& call) {
  check_packed(call.weight, call.n(), call.k(), x);
  const Tensor rows = left_operand(x), y = base_forward(rows, call), xa = add_branch(y, rows, call);
  return {shaped_like(x, y), xa};
}

Gradients backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& xa, const LinearCall& call, const Wanted& wanted) {
  check_packed(call.weight, call.k(), call.n(), dy);
  const Tensor rows = left_operand(dy);
  const auto none = [&] { return not_wanted(dy); };
  Gradients gradients{none(), none(), none(), none()};
  if (wanted.dx) gradients.dx = base_backward(rows, call.weight);
  const bool adapted = call.r() > 0;
  if (adapted && (wanted.dx || wanted.da)) gradients.da = add_adapter(gradients.dx, rows, x, call, wanted);
  if (adapted && wanted.db) gradients.db = gradient_of_b(rows, *xa, call);
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

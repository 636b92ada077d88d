// The operators of the compiled CUDA part; their schemas stand in lora_kernels/ops/linear.py and registration.py.

#include <torch/csrc/stable/library.h>

#include <string>

#include "linear.h"
#include "plan.h"

namespace lora_kernels {

namespace {

// The launch that a plan asks for: its kernel; programs, threads, bytes of shared memory, programs that must run together.
std::tuple<std::string, std::vector<int64_t>> planned(std::vector<int64_t> problem, std::vector<int64_t> numbers) {
  STD_TORCH_CHECK(problem.size() == 13, "problem: expected 13 numbers, got ", problem.size());
  const auto number = [&](int which) { return static_cast<int>(problem[which]); };
  const auto flag = [&](int which) { return problem[which] != 0; };
  Problem p{};
  p.m = number(0), p.n = number(1), p.k = number(2), p.r = number(3);
  p.type = static_cast<Type>(problem[4]);
  p.dropout = flag(5);
  p.in_chunks = p.in_boxes = flag(6);
  p.backward = flag(7);
  p.dx = flag(8), p.da = flag(9), p.db = flag(10), p.dbias = flag(11);
  p.store = static_cast<Store>(problem[12]);
  const Device device = Device::of(numbers);
  const Launch how = has_few_rows(p) ? few_rows_plan(p, device).launch : plan(p, device).large;
  return {how.kernel, {how.grid, how.threads, how.shared_bytes, how.together}};
}

}  // namespace

}  // namespace lora_kernels

// Of a GPU's tensors; an executor's calls are sent here too (lora_kernels/impl/cuda/launch.py).
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) {
  using namespace lora_kernels;
  m.impl("lora_linear_forward_cuda", TORCH_BOX((&forward_operator<linear_forward, kLinearFormats>)));
  m.impl("lora_linear_backward_cuda", TORCH_BOX((&backward_operator<linear_backward, kLinearFormats>)));
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_plan", TORCH_BOX(&lora_kernels::planned));
}

// The adapter branch, which the layers share; see branch.h.

#include "branch.h"

#include "parallel.h"

namespace lora_kernels {

Mask mask_of(const LinearCall& call) {
  if (!call.dropout) return {};
  const auto [seed, threshold] = *call.dropout;
  return {call.k(), static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())), threshold};
}

float keep_scale(const Mask& mask) { return 65536.0f / static_cast<float>(65536 - mask.threshold); }

float scale_of(const Adapter& adapter) {
  if (!adapter.scaling_tensor) return static_cast<float>(adapter.scaling);
  const Tensor value = torch::stable::to(*adapter.scaling_tensor, ScalarType::Float);
  return *static_cast<const float*>(value.const_data_ptr());
}

Tensor add_adapter(
    const Tensor& dx, const Tensor& dy_rows, const OptionalTensor& x, const LinearCall& call, const Wanted& wanted) {
  const auto& [a, b, scaling_tensor, scaling] = call.adapter;
  const int64_t m = dy_rows.size(0), stride = round_up(call.r(), kLanes);
  const Mask mask = mask_of(call);
  const float scale = scale_of(call.adapter) * keep_scale(mask);
  const Panel over_n = kernels().panel_over_rows(matrix(factor(b, dy_rows)));
  const Panel over_r = kernels().panel_over_rows(matrix(factor(a, dy_rows)));
  const Buffer<float> q(m * stride);
  in_parallel(m, kRowGroup, stride * call.n(), [&](int64_t begin, int64_t end) {
    kernels().rows_product(matrix(dy_rows), over_n, scale, q.get(), {}, begin, end);
  });
  const OptionalTensor into = wanted.dx ? OptionalTensor(dx) : std::nullopt;
  const OptionalTensor from = wanted.da ? OptionalTensor(as_matrix(*x)) : std::nullopt;
  const Sums sums(wanted.da ? stride : 0, call.k());
  column_pass(into, from, over_r, {q.get(), stride}, mask, sums);
  return wanted.da ? sums.as_rows(call.r(), a, 1) : torch::stable::new_empty(dy_rows, {0});
}

}  // namespace lora_kernels

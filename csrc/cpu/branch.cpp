// The adapter branch, which the layers share; see branch.h.

#include "branch.h"

#include <algorithm>

#include "parallel.h"

namespace lora_kernels {

namespace {

constexpr int64_t kFewRows = 4;

// A factor as float32 rows.
Tensor float_rows(const Tensor& parameter) { return as_matrix(as_floats(parameter)); }

}  // namespace

Mask mask_of(const LinearCall& call) {
  if (!call.dropout) return {};
  const auto& [seed, threshold, rows] = *call.dropout;
  return {call.k(), static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())), threshold, rows};
}

float keep_scale(const Mask& mask) { return 65536.0f / static_cast<float>(65536 - mask.threshold); }

float scale_of(const Adapter& adapter) {
  if (!adapter.scaling_tensor) return static_cast<float>(adapter.scaling);
  const Tensor value = torch::stable::to(*adapter.scaling_tensor, ScalarType::Float);
  return *static_cast<const float*>(value.const_data_ptr());
}

Tensor add_branch(const Tensor& y, const Tensor& rows, const LinearCall& call) {
  const Tensor a = factor(call.adapter.a, rows), b = factor(call.adapter.b, rows);
  const int64_t m = rows.size(0), r = call.r();
  const Tensor xa = empty_matrix(m, r, rows.scalar_type());
  if (r == 0) return xa;
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
  return xa;
}

bool has_few_rows(const Tensor& rows, const LinearCall& call) {
  return rows.size(0) <= kFewRows && !call.dropout && std::min(call.r(), call.n()) >= kRowGroup;
}

Tensor add_branch_of_few(const Tensor& y, const Tensor& rows, const LinearCall& call) {
  const Tensor a = float_rows(call.adapter.a), b = float_rows(call.adapter.b);
  const int64_t m = rows.size(0), n = call.n(), k = call.k(), r = call.r();
  const Tensor xa = empty_matrix(m, r, rows.scalar_type());
  const Buffer<float> x(m * k), q(m * r), added(n);
  to_floats(matrix(rows), 0, m, x.get());
  in_parallel(r, kRowGroup, m * k, [&](int64_t begin, int64_t end) {
    kernels().few_rows({x.get(), k, m, k, false}, matrix(a), {}, {q.get(), r, m, r, false}, begin, end);
  });
  write_rows(q.get(), r, xa, 0, m);
  const float scale = scale_of(call.adapter);
  std::for_each(q.get(), q.get() + m * r, [=](float& v) { v *= scale; });
  for (int64_t i = 0; i < m; ++i) {
    const Matrix one{q.get() + i * r, r, 1, r, false};
    in_parallel(n, kRowGroup, r, [&](int64_t begin, int64_t end) {
      kernels().few_rows(one, matrix(b), {}, {added.get(), n, 1, n, false}, begin, end);
    });
    add_floats(added.get(), y, i);
  }
  return xa;
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
  return wanted.da ? sums.as_rows(call.r(), a, 1) : not_wanted(dy_rows);
}

Tensor gradient_of_b(const Tensor& dy_rows, const Tensor& xa, const LinearCall& call) {
  const int64_t stride = round_up(call.r(), kLanes);
  const Buffer<float> q = padded_floats(xa, stride);
  const Sums sums(stride, call.n());
  column_sums(dy_rows, {q.get(), stride}, sums);
  return sums.as_columns(call.r(), call.adapter.b, scale_of(call.adapter));
}

}  // namespace lora_kernels

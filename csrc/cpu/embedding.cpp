// The adapted embedding on CPUs: lora_kernels::lora_embedding_{forward,backward}_cpu.
//
// Schemas and documentation stand in lora_kernels/ops/embedding.py, formulas in lora_kernels/impl/reference/embedding.py. A row
// of W is looked up where the branch is added to it, in a cache; A's columns are gathered as they lie.

#include "../common/embedding.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "branch.h"
#include "parallel.h"
#include "rows.h"

namespace lora_kernels {

namespace {

constexpr int64_t kCachedRows = 32;  // of y, that lie in L2

float number_of(const Tensor& t) { return *static_cast<const float*>(as_floats(t).const_data_ptr()); }

// What the branch is multiplied by.
float factor_of(const EmbeddingCall& call) {
  return scale_of(call.adapter) * (call.embed_scale ? number_of(*call.embed_scale) : 1.0f);
}

// xa [M, R], A's columns of the ids rounded to the type of v, as float32 rows.
Buffer<float> gathered(const EmbeddingCall& call, const Tensor& v) {
  const Tensor xa = empty_matrix(call.rows(), call.r(), call.adapter.a.scalar_type());
  copy_rows(transposed(call.adapter.a), call.ids, 0, call.rows(), xa);
  return padded_floats(factor(xa, v), round_up(call.r(), kLanes));
}

Tensor forward(const EmbeddingCall& call) {
  const Tensor& w = *call.weight;
  const int64_t m = call.rows(), stride = round_up(call.r(), kLanes);
  const Tensor y = empty_matrix(m, call.h(), w.scalar_type());
  const Panel over_r = kernels().panel_over_columns(matrix(factor(call.adapter.b, y)));
  const Buffer<float> q = gathered(call, y), scales(round_up(call.h(), kColumnBlock));
  const float times = factor_of(call);
  std::for_each(q.get(), q.get() + m * stride, [=](float& number) { number *= times; });
  if (call.embed_scale) std::fill_n(scales.get(), round_up(call.h(), kColumnBlock), number_of(*call.embed_scale));
  in_parallel(m, kCachedRows, call.h() * (call.r() + 1), [&](int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += kCachedRows) {
      const int64_t end = std::min(begin + kCachedRows, last);
      copy_rows(w, call.ids, begin, end, y);
      if (call.embed_scale) kernels().rescale(matrix(y), scales.get(), {}, nullptr, matrix(y), begin, end);
      kernels().add_low_rank(matrix(y), over_r, q.get(), stride, begin, end);
    }
  });
  return y;
}

// dA [R, V]: the sums of the rows of dxa [M, stride] that have one id, in order.
Tensor gradient_of_a(const float* dxa, int64_t stride, const EmbeddingCall& call) {
  const Tensor da = stack_of({call.r(), call.v()}, ScalarType::Float, true);
  in_parallel(call.r(), 1, call.rows(), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* const sums = static_cast<float*>(da.mutable_data_ptr()) + r * call.v();
      for (int64_t i = 0; i < call.rows(); ++i) {
        const int64_t id = call.ids[static_cast<size_t>(i)];
        if (id != call.padding_idx) sums[id] += dxa[i * stride + r];
      }
    }
  });
  const ScalarType type = call.adapter.a.scalar_type();
  return type == ScalarType::Float ? da : torch::stable::to(da, type);
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const EmbeddingCall& call, bool wants_da, bool wants_db) {
  const int64_t m = call.rows(), stride = round_up(call.r(), kLanes);
  const float times = factor_of(call);
  Tensor da = not_wanted(dy), db = not_wanted(dy);
  if (wants_da) {
    const Panel over_h = kernels().panel_over_rows(matrix(factor(call.adapter.b, dy)));
    const Buffer<float> dxa(m * stride);
    in_parallel(m, kRowGroup, stride * call.h(), [&](int64_t begin, int64_t end) {
      kernels().rows_product(matrix(dy), over_h, times, dxa.get(), {}, begin, end);
    });
    da = gradient_of_a(dxa.get(), stride, call);
  }
  if (wants_db) {
    const Buffer<float> xa = gathered(call, dy);
    const Sums sums(stride, call.h());
    column_sums(dy, {xa.get(), stride}, sums);
    db = sums.as_columns(call.r(), call.adapter.b, times);
  }
  return {da, db};
}

}  // namespace

// The boxed entries: they alone take a call's parts one by one, in the schemas' order.
Tensor embedding_forward(
    Tensor ids, Tensor weight, Tensor lora_A, Tensor lora_B, OptionalTensor scaling_tensor, double scaling,
    int64_t padding_idx, OptionalTensor embed_scale) {
  EmbeddingCall call{std::move(weight), {std::move(lora_A), std::move(lora_B), std::move(scaling_tensor), scaling},
                     padding_idx, std::move(embed_scale), {}};
  const Tensor& w = *call.weight;
  arguments::check_memory("weight", w, w);
  check_served("weight", w);
  arguments::check_embedding(ids, w, call);
  arguments::check_size(w.dim() == 2 && w.size(0) == call.v() && w.size(1) == call.h(), "weight", "[V, H]", w);
  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(call.h());
  return torch::stable::reshape(forward(call), sizes);
}

std::tuple<Tensor, Tensor> embedding_backward(
    Tensor dy, Tensor ids, Tensor lora_A, Tensor lora_B, OptionalTensor scaling_tensor, double scaling, int64_t padding_idx,
    OptionalTensor embed_scale, std::vector<bool> flags) {
  EmbeddingCall call{std::nullopt, {std::move(lora_A), std::move(lora_B), std::move(scaling_tensor), scaling}, padding_idx,
                     std::move(embed_scale), {}};
  arguments::check_memory("dy", dy, dy);
  check_served("dy", dy);
  arguments::check_embedding(ids, dy, call);
  const bool fits = dy.dim() == ids.dim() + 1 && dy.size(-1) == call.h() && dy.numel() == call.rows() * call.h();
  arguments::check_size(fits, "dy", "[..., H] with the rows of ids", dy);
  STD_TORCH_CHECK(flags.size() == 2, "wanted: expected two, got ", flags.size());
  const Tensor rows = torch::stable::reshape(dy, {call.rows(), call.h()});
  return backward(left_operand(rows), call, flags[0], flags[1]);
}

}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("lora_embedding_forward_cpu", TORCH_BOX(&lora_kernels::embedding_forward));
  m.impl("lora_embedding_backward_cpu", TORCH_BOX(&lora_kernels::embedding_backward));
}

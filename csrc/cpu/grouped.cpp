// The grouped LoRA linear on CPUs: lora_kernels::grouped_lora_linear_{forward,backward}_cpu.
//
// Schemas and documentation stand in lora_kernels/ops/grouped.py. A group is what linear.cpp computes for its rows, which are
// copied to one place where they are named. Groups with one W have one product with it. A and B are laid out by groups once
// a call.

#include "../common/grouped.h"

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>

#include "base_product.h"
#include "branch.h"
#include "rows.h"

namespace lora_kernels {

namespace {

// A or B of all groups, one after the other, in a type that sums are made of: the groups' gradients have it, too.
Tensor factors_of(const Tensor& parameter) {
  const ScalarType type = parameter.scalar_type();
  const bool known = type == ScalarType::Float || type == ScalarType::BFloat16;
  return torch::stable::contiguous(known ? parameter : torch::stable::to(parameter, ScalarType::Float));
}

// The calls of a grouped call's groups, each of the adapted layer.
class Parts {
 public:
  explicit Parts(const GroupedCall& call)
      : call_(call), a_(factors_of(call.adapter.a)), b_(factors_of(call.adapter.b)) {
    if (call.bias) bias_ = torch::stable::contiguous(*call.bias);
    if (const OptionalTensor& scaling = call.adapter.scaling_tensor) {
      const int64_t count = scaling->numel();
      scalings_ = Buffer<float>(count);
      const Tensor floats = torch::stable::contiguous(torch::stable::to(*scaling, ScalarType::Float));
      std::copy_n(static_cast<const float*>(floats.const_data_ptr()), count, scalings_->get());
    }
    if (call.dropout && call.groups.places.empty()) {
      own_.resize(static_cast<size_t>(call.count));
      std::iota(own_.begin(), own_.end(), 0);
    }
  }

  LinearCall of(const Span& span) const {
    const int64_t g = std::max<int64_t>(span.adapter, 0);
    Tensor matrix = part_of(call_.weight, span.weight);
    LinearCall own{{matrix, std::nullopt, "dense", {}, call_.n(), call_.k()},
                   {part_of(a_, g), part_of(b_, g), std::nullopt, scaling_of(g)},
                   bias_ ? OptionalTensor(part_of(*bias_, span.weight)) : std::nullopt,
                   call_.dropout};
    if (own.dropout) own.dropout->rows = (own_.empty() ? call_.groups.places : own_).data() + span.begin;
    return own;
  }

 private:
  const GroupedCall& call_;
  const Tensor a_, b_;
  OptionalTensor bias_;
  std::optional<Buffer<float>> scalings_;
  std::vector<int64_t> own_;  // the mask's rows, where none are named

  double scaling_of(int64_t adapter) const {
    if (!scalings_) return call_.adapter.scaling;
    return scalings_->get()[call_.adapter.scaling_tensor->numel() > 1 ? adapter : 0];
  }
};

// The product with W of each group's rows: made group by group, or for all groups at once where they have one W.
template <class Product>
class Bases {
 public:
  Bases(const GroupedCall& call, const Parts& parts, const Tensor& v, const std::vector<int64_t>& named, Product product)
      : v_(v), named_(named), product_(product) {
    if (call.weight.size(0) > 1 || call.groups.spans.empty()) return;
    all_ = product(rows_of(v, named, 0, call.groups.spans.back().end), parts.of(call.groups.spans.front()));
  }

  // Rows of v, and their product.
  std::tuple<Tensor, Tensor> of(const Span& span, const LinearCall& own) const {
    const Tensor rows = rows_of(v_, named_, span.begin, span.end);
    return {rows, all_ ? rows_of(*all_, {}, span.begin, span.end) : product_(rows, own)};
  }

 private:
  const Tensor& v_;
  const std::vector<int64_t>& named_;
  const Product product_;
  OptionalTensor all_;
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const GroupedCall& call) {
  const Groups& groups = call.groups;
  const int64_t end = groups.spans.empty() ? 0 : groups.spans.back().end;
  const bool all = end == call.count && groups.places.empty();
  const Tensor y = stack_of({call.count, call.n()}, x.scalar_type(), !all);
  const Tensor xa = stack_of({call.count, call.r()}, x.scalar_type(), true);
  const Parts parts(call);
  const Bases bases(call, parts, x, groups.rows, [](const Tensor& rows, const LinearCall& own) {
    return base_forward(left_operand(rows), own);
  });
  for (const Span& span : groups.spans) {
    const LinearCall own = parts.of(span);
    const auto [rows, out] = bases.of(span, own);
    if (span.adapter >= 0) put_rows(add_branch(out, left_operand(rows), own), xa, {}, span.begin);
    put_rows(out, y, groups.places, span.begin);
  }
  return {y, xa};
}

Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

Gradients backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& xa, const GroupedCall& call, const Wanted& wanted) {
  const Groups& groups = call.groups;
  const ScalarType type = dy.scalar_type();
  const bool by_rows = !groups.rows.empty();
  const Tensor &a = call.adapter.a, &b = call.adapter.b;
  const auto zeros = [](bool of, const std::vector<int64_t>& sizes, ScalarType of_type) {
    return of ? stack_of(sizes, of_type, true) : empty({0}, of_type);
  };
  const Tensor dx = zeros(wanted.dx, {call.tokens, call.k()}, by_rows ? ScalarType::Float : type);
  const Tensor da = zeros(wanted.da, {a.size(0), a.size(1), a.size(2)}, ScalarType::Float);
  const Tensor db = zeros(wanted.db, {b.size(0), b.size(1), b.size(2)}, ScalarType::Float);
  const Tensor dbias = zeros(wanted.dbias, {call.weight.size(0), call.n()}, ScalarType::Float);
  const Parts parts(call);
  const Bases bases(call, parts, dy, groups.places, [&](const Tensor& rows, const LinearCall& own) {
    return wanted.dx ? base_backward(left_operand(rows), own.weight) : rows;
  });
  for (const Span& span : groups.spans) {
    const LinearCall own = parts.of(span);
    const auto [dy_rows, out] = bases.of(span, own);
    const Tensor rows = left_operand(dy_rows);
    if (span.adapter >= 0 && (wanted.dx || wanted.da)) {
      const OptionalTensor read = wanted.da ? OptionalTensor(rows_of(*x, groups.rows, span.begin, span.end)) : std::nullopt;
      const Tensor part = add_adapter(out, rows, read, own, wanted);
      if (wanted.da) add_part(part, da, span.adapter);
    }
    if (span.adapter >= 0 && wanted.db) {
      add_part(gradient_of_b(rows, rows_of(*xa, {}, span.begin, span.end), own), db, span.adapter);
    }
    if (wanted.dx && by_rows) add_rows(out, dx, groups.rows, span.begin);
    if (wanted.dx && !by_rows) put_rows(out, dx, {}, span.begin);
    if (wanted.dbias) add_part(torch::stable::sum(rows, std::vector<int64_t>{0}), dbias, span.weight);
  }
  return {as_type(dx, type), as_type(da, a.scalar_type()), as_type(db, b.scalar_type()), as_type(dbias, type)};
}

}  // namespace

// The boxed entries: they alone take a call's parts one by one, in the schemas' order.
std::tuple<Tensor, Tensor> grouped_forward(
    Tensor x, OptionalTensor bias, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor offsets, OptionalTensor rows,
    OptionalTensor scatter, OptionalTensor adapters, OptionalTensor weights, OptionalTensor seed, int64_t threshold,
    OptionalTensor scaling_tensor, double scaling) {
  const int64_t tokens = x.dim() ? x.size(0) : 0;
  GroupedCall call{std::move(weight), {std::move(lora_A), std::move(lora_B), std::move(scaling_tensor), scaling},
                   std::move(bias), arguments::dropout_of(seed, threshold), tokens, rows ? rows->numel() : tokens, {}};
  arguments::check_grouped("x", x, call);
  arguments::check_size(x.size(1) == call.k(), "x", "[T, K]", x);
  call.groups = arguments::groups_of(call, offsets, rows, scatter, adapters, weights);
  return forward(x, call);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grouped_backward(
    Tensor dy, OptionalTensor x, OptionalTensor xa, int64_t tokens, Tensor weight, Tensor lora_A, Tensor lora_B,
    Tensor offsets, OptionalTensor rows, OptionalTensor scatter, OptionalTensor adapters, OptionalTensor weights,
    OptionalTensor seed, int64_t threshold, OptionalTensor scaling_tensor, double scaling, std::vector<bool> flags) {
  GroupedCall call{std::move(weight), {std::move(lora_A), std::move(lora_B), std::move(scaling_tensor), scaling},
                   std::nullopt, arguments::dropout_of(seed, threshold), tokens, rows ? rows->numel() : tokens, {}};
  const Wanted wanted = arguments::wanted_of(flags);
  STD_TORCH_CHECK(tokens >= 0, "tokens: expected a number of rows, got ", tokens);
  arguments::check_grouped_backward(dy, x, xa, call, wanted);
  call.groups = arguments::groups_of(call, offsets, rows, scatter, adapters, weights);
  const Gradients gradients = backward(dy, x, xa, call, wanted);
  return {gradients.dx, gradients.da, gradients.db, gradients.dbias};
}

}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("grouped_lora_linear_forward_cpu", TORCH_BOX(&lora_kernels::grouped_forward));
  m.impl("grouped_lora_linear_backward_cpu", TORCH_BOX(&lora_kernels::grouped_backward));
}

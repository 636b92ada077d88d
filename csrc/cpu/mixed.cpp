// A linear layer whose rows have adapters of their own, on CPUs: lora_kernels::mixed_lora_linear_{forward,backward}_cpu.
//
// Schemas and documentation stand in lora_kernels/ops/mixed.py. All rows have one product with W. An adapter's rows are read and
// written where they lie if they are one after the other, else copied to one place; its factors are read where they lie.

#include "../common/mixed.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "base_product.h"
#include "branch.h"
#include "rows.h"

namespace lora_kernels {

namespace {

using Lists = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor>;

// One adapter's rows, in memory of their own unless they lie there one after the other.
class Part {
 public:
  Part(const MixedCall& call, const Span& span)
      : order_(call.order), span_(span), first_(call.order[static_cast<size_t>(span.begin)]) {
    const auto index = static_cast<size_t>(span.adapter);
    const int64_t last = call.order[static_cast<size_t>(span.end - 1)];
    adjacent_ = last - first_ == span.end - span.begin - 1;
    own_ = {{call.weight, std::nullopt, "dense", {}, call.n(), call.k()},
            {call.a[index], call.b[index], std::nullopt, call.scalings[index]},
            std::nullopt,
            call.dropout};
    if (own_->dropout) own_->dropout->rows = order_.data() + span.begin;
  }

  const LinearCall& call() const { return *own_; }

  Tensor read(const Tensor& v) const {
    return adjacent_ ? rows_of(v, {}, first_, first_ + span_.end - span_.begin) : rows_of(v, order_, span_.begin, span_.end);
  }

  // Brings back what was read and changed.
  void write(const Tensor& rows, const Tensor& to) const {
    if (!adjacent_) put_rows(rows, to, order_, span_.begin);
  }

  // Writes the first columns of the rows.
  void put(const Tensor& rows, const Tensor& to) const { put_rows(rows, to, order_, span_.begin); }

 private:
  const std::vector<int64_t>& order_;
  const Span span_;
  const int64_t first_;
  bool adjacent_;
  std::optional<LinearCall> own_;
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const MixedCall& call) {
  const LinearCall base{{call.weight, std::nullopt, "dense", {}, call.n(), call.k()}, {x, x, std::nullopt, 0},
                        call.bias, std::nullopt};
  const Tensor rows = left_operand(x), y = base_forward(rows, base);
  const Tensor xa = stack_of({x.size(0), call.ranks}, x.scalar_type(), true);
  for (const Span& span : call.spans) {
    const Part part(call, span);
    const Tensor out = part.read(y), some = left_operand(part.read(rows));
    const auto add = has_few_rows(some, part.call()) ? add_branch_of_few : add_branch;
    part.put(add(out, some, part.call()), xa);
    part.write(out, y);
  }
  return {y, xa};
}

// Zeros, the gradient of a factor that no row has read.
Tensor zeros_like(const Tensor& factor) { return stack_of({factor.size(0), factor.size(1)}, factor.scalar_type(), true); }

Lists backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& xa, const MixedCall& call, const Wanted& wanted) {
  const Tensor rows = left_operand(dy);
  const Weight weight{call.weight, std::nullopt, "dense", {}, call.n(), call.k()};
  const Tensor dx = wanted.dx ? base_backward(rows, weight) : not_wanted(dy);
  std::vector<Tensor> da, db;
  for (size_t i = 0; wanted.da && i < call.a.size(); ++i) da.push_back(zeros_like(call.a[i]));
  for (size_t i = 0; wanted.db && i < call.b.size(); ++i) db.push_back(zeros_like(call.b[i]));
  for (const Span& span : call.spans) {
    const Part part(call, span);
    const auto index = static_cast<size_t>(span.adapter);
    const Tensor some = left_operand(part.read(rows));
    if (wanted.dx || wanted.da) {
      const Tensor out = wanted.dx ? part.read(dx) : dx;
      const OptionalTensor read = wanted.da ? OptionalTensor(part.read(*x)) : std::nullopt;
      const Tensor sums = add_adapter(out, some, read, part.call(), wanted);
      if (wanted.dx) part.write(out, dx);
      if (wanted.da) da[index] = sums;
    }
    if (wanted.db) {
      const Tensor shrunk = part.read(*xa);
      db[index] = gradient_of_b(some, columns_of(shrunk, part.call().r()), part.call());
    }
  }
  const Tensor dbias = wanted.dbias ? torch::stable::sum(rows, std::vector<int64_t>{0}) : not_wanted(dy);
  return {dx, da, db, dbias};
}

}  // namespace

// The boxed entries: they alone take a call's parts one by one, in the schemas' order.
std::tuple<Tensor, Tensor> mixed_forward(
    Tensor x, OptionalTensor bias, Tensor weight, std::vector<Tensor> lora_A, std::vector<Tensor> lora_B, Tensor scalings,
    Tensor owners, OptionalTensor seed, int64_t threshold) {
  MixedCall call{std::move(weight), std::move(lora_A), std::move(lora_B), {}, std::move(bias),
                 arguments::dropout_of(seed, threshold), 0, {}, {}};
  arguments::check_mixed("x", x, call);
  arguments::check_size(x.size(1) == call.k(), "x", "[M, K]", x);
  arguments::read_owners(call, x, scalings, owners);
  return forward(x, call);
}

Lists mixed_backward(
    Tensor dy, OptionalTensor x, OptionalTensor xa, Tensor weight, std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
    Tensor scalings, Tensor owners, OptionalTensor seed, int64_t threshold, std::vector<bool> flags) {
  MixedCall call{std::move(weight), std::move(lora_A), std::move(lora_B), {}, std::nullopt,
                 arguments::dropout_of(seed, threshold), 0, {}, {}};
  const Wanted wanted = arguments::wanted_of(flags);
  arguments::check_mixed("dy", dy, call);
  arguments::check_size(dy.size(1) == call.n(), "dy", "[M, N]", dy);
  arguments::read_owners(call, dy, scalings, owners);
  arguments::check_mixed_backward(dy, x, xa, call, wanted);
  return backward(dy, x, xa, call, wanted);
}

}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("mixed_lora_linear_forward_cpu", TORCH_BOX(&lora_kernels::mixed_forward));
  m.impl("mixed_lora_linear_backward_cpu", TORCH_BOX(&lora_kernels::mixed_backward));
}

// The DoRA layer on CPUs: lora_kernels::lora_dora_linear_{forward,backward}_cpu.
//
// Schemas and documentation stand in lora_kernels/ops/dora.py, formulas in lora_kernels/impl/reference/dora.py. What
// linear.cpp does is done so here; g joins where rows lie in a cache, and B, so that dy B needs no rescaled dy. D(x) and
// rescaled rows that meet W live for a block of rows, without dropout g dy as a whole.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#include "../common/dora.h"
#include "base_product.h"
#include "branch.h"
#include "library_product.h"
#include "norms.h"
#include "parallel.h"

namespace lora_kernels {

namespace {

constexpr std::array kFormats{"dense"};
constexpr int64_t kCachedRows = 32;            // rows of u and y that lie in L2
constexpr int64_t kDroppedNumbers = 1 << 20;   // of D(x), beside which the library's own copy of W is small
constexpr float kSumsApart = 16;               // as lora_kernels/operands/dora.py has it

// How far rounding to a type takes a number, as a part of it.
double half_unit(ScalarType type) {
  if (type == ScalarType::BFloat16) return std::ldexp(1.0, -8);
  if (type == ScalarType::Half) return std::ldexp(1.0, -11);
  return std::ldexp(1.0, type == ScalarType::Float ? -24 : -53);
}

Buffer<float> padded_vector(const Tensor& t) {
  const Tensor row = torch::stable::reshape(as_floats(t), {1, t.numel()});
  return padded_floats(row, round_up(t.numel(), kColumnBlock));
}

// g as gain_of of lora_kernels/operands/dora.py has it: 1 where magnitude and norm differ by roundings alone.
struct Gain {
  int64_t count, padded;
  Buffer<float> g;

  Gain(const Tensor& magnitude, const Tensor& norm)
      : count(norm.numel()), padded(round_up(count, kColumnBlock)), g(padded_vector(magnitude)) {
    const Buffer<float> lengths = padded_vector(norm);
    const auto near = static_cast<float>(
        half_unit(magnitude.scalar_type()) + kSumsApart * std::numeric_limits<float>::epsilon());
    std::transform(g.get(), g.get() + count, lengths.get(), g.get(), [near](float m, float n) {
      return std::abs(1 - m / n) <= near ? 1.0f : m / n;
    });
  }

  bool is_one() const {
    return std::all_of(g.get(), g.get() + count, [](float v) { return v == 1; });
  }

  // (g - 1) * factor
  Buffer<float> beyond_one(float factor) const {
    Buffer<float> made(padded);
    std::transform(g.get(), g.get() + padded, made.get(), [factor](float v) { return (v - 1) * factor; });
    return made;
  }

  // g B, in the type of v.
  Tensor times(const Tensor& b, const Tensor& v) const {
    const int64_t r = b.size(1);
    const Buffer<float> rows = padded_floats(as_floats(b), r);
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t i = 0; i < r; ++i) rows.get()[n * r + i] *= g.get()[n];
    }
    const Tensor made = empty_matrix(count, r, v.scalar_type());
    write_rows(rows.get(), r, made, 0, count);
    return made;
  }
};

bool is_zero(const Tensor& b) {
  const Buffer<float> numbers = padded_floats(as_floats(b), b.size(1));
  return std::all_of(numbers.get(), numbers.get() + b.numel(), [](float v) { return v == 0; });
}

Tensor narrow_rows(const Tensor& t, int64_t first, int64_t count) { return torch::stable::narrow(t, 0, first, count); }

int64_t rows_at_a_time(int64_t columns) {
  return std::max<int64_t>(kDroppedNumbers / std::max<int64_t>(columns, 1) / kCachedRows * kCachedRows, kCachedRows);
}

// A forward call: its factors, and q = scaling * D(x) AT, which is made group by group.
struct Branch {
  Mask mask;
  Panel over_k, over_r;
  Buffer<float> q;
  float scale;

  Branch(const Tensor& rows, const LinearCall& call)
      : mask(mask_of(call)),
        over_k(kernels().panel_over_columns(matrix(factor(call.adapter.a, rows)))),
        over_r(kernels().panel_over_columns(matrix(factor(call.adapter.b, rows)))),
        q(rows.size(0) * over_k.pitch),
        scale(scale_of(call.adapter)) {}

  // xa and q of rows [begin, end).
  void shrink(const Tensor& rows, const Tensor& xa, int64_t begin, int64_t end) const {
    kernels().rows_product(matrix(rows), over_k, keep_scale(mask), q.get(), mask, begin, end);
    write_rows(q.get(), over_k.pitch, xa, begin, end);
    rescale_q(scale, begin, end);
  }

  void rescale_q(float by, int64_t begin, int64_t end) const {
    std::for_each(q.get() + begin * over_k.pitch, q.get() + end * over_k.pitch, [=](float& v) { v *= by; });
  }

  void expand(const Matrix& y, int64_t begin, int64_t end) const {
    kernels().add_low_rank(y, over_r, q.get(), over_k.pitch, begin, end);
  }
};

// Calls f(begin, end) for groups of rows that stay in L2.
template <class F>
void in_groups(int64_t rows, int64_t work, F f) {
  in_parallel(rows, kRowGroup, work, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += kCachedRows) f(begin, std::min(begin + kCachedRows, end));
  });
}

// What a forward call returns beside the norm, y as a matrix.
struct Outputs {
  Tensor y, xa, u;
};

// u, to which the branch is added, and y = g u + bias unless it is there.
void finish_plain(
    const Tensor& rows, const Branch& branch, const Gain& gain, const float* bias, const Outputs& out, bool has_y) {
  const int64_t work = branch.over_k.width * (rows.size(1) + gain.count);
  const Matrix u = matrix(out.u), y = matrix(out.y);
  in_groups(rows.size(0), work, [&](int64_t begin, int64_t end) {
    branch.shrink(rows, out.xa, begin, end);
    branch.expand(u, begin, end);
    if (!has_y) kernels().rescale(u, gain.g.get(), Matrix{}, bias, y, begin, end);
  });
}

// u = D(x) WT + q BT for a block of rows from the `first` on, and (g - 1) u added to y, which has the branch's share.
void finish_dropped(
    const Tensor& rows, const LinearCall& plain, const Branch& branch, const Gain& gain, int64_t first,
    const Outputs& out) {
  const int64_t count = rows.size(0), pitch = branch.over_k.pitch;
  const float factor = keep_scale(branch.mask);
  const Tensor dropped = empty_matrix(count, rows.size(1), rows.scalar_type());
  in_parallel(count, kRowGroup, rows.size(1), [&](int64_t begin, int64_t end) {
    kernels().add_kept(matrix(rows), 1, branch.mask, first, matrix(dropped), false, begin, end);
  });
  const Tensor product = base_forward(dropped, plain);
  const Buffer<float> more = gain.beyond_one(factor), same(gain.padded);
  std::fill(same.get(), same.get() + gain.padded, factor);
  const Matrix made = matrix(product), y = rows_of(matrix(out.y), first, count);
  const Matrix u = rows_of(matrix(out.u), first, count);
  in_groups(count, branch.over_k.width * gain.count, [&](int64_t begin, int64_t end) {
    // D's factor comes last: it would round D(x).
    branch.rescale_q(1 / factor, first + begin, first + end);
    kernels().add_low_rank(made, branch.over_r, branch.q.get() + first * pitch, pitch, begin, end);
    kernels().rescale(made, more.get(), y, nullptr, y, begin, end);
    kernels().rescale(made, same.get(), Matrix{}, nullptr, u, begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const DoraCall& call) {
  check_served("x", x);
  const LinearCall& linear = call.linear;
  const LinearCall plain{linear.weight, linear.adapter, std::nullopt, linear.dropout};
  const Tensor rows = left_operand(x);
  const int64_t m = rows.size(0), n = linear.n();
  const Branch branch(rows, linear);
  const Tensor norm = row_norms(linear, branch.scale), xa = empty_matrix(m, linear.r(), x.scalar_type());
  const Gain gain(call.magnitude, norm);
  // At its start the layer is its base layer, bit for bit.
  const bool starts = gain.is_one() && is_zero(linear.adapter.b);
  const auto as_torch = [&] { return torch_linear(rows, linear.weight.matrix, linear.bias); };
  const auto uninitialised = [&] { return empty_matrix(m, n, x.scalar_type()); };
  if (!linear.dropout) {
    // Without a bias u is that layer's output, too.
    const bool has_y = starts && linear.bias;
    const Tensor u = starts && !linear.bias ? as_torch() : base_forward(rows, plain);
    const Outputs out{has_y ? as_torch() : uninitialised(), xa, u};
    const Buffer<float> bias = linear.bias ? padded_vector(*linear.bias) : Buffer<float>(0);
    finish_plain(rows, branch, gain, linear.bias ? bias.get() : nullptr, out, has_y);
    return {shaped_like(x, out.y), xa, out.u, norm};
  }
  const Outputs out{starts ? as_torch() : base_forward(rows, linear), xa, uninitialised()};
  in_groups(m, linear.r() * (linear.k() + n), [&](int64_t begin, int64_t end) {
    branch.shrink(rows, xa, begin, end);
    branch.expand(matrix(out.y), begin, end);
  });
  const int64_t step = rows_at_a_time(std::max(n, linear.k()));
  for (int64_t first = 0; first < m; first += step) {
    finish_dropped(narrow_rows(rows, first, std::min(step, m - first)), plain, branch, gain, first, out);
  }
  return {shaped_like(x, out.y), xa, out.u, norm};
}

// What a pass over dy multiplies by, and what it sums: dy * u by columns, if there is a u.
struct DyPass {
  const float* gain;
  OptionalTensor u;
  float* sums;

  // Writes gain * dy to dz, if there is one.
  void operator()(const Tensor& dy, const OptionalTensor& dz) const {
    const Matrix none{};
    in_parallel(dy.size(1), kColumnBlock, dy.size(0), [&](int64_t begin, int64_t end) {
      kernels().gain_pass(matrix(dy), gain, u ? matrix(*u) : none, dz ? matrix(*dz) : none, sums, begin, end);
    });
  }
};

// Adds D(dz W) to dx for rows from the `first` of the mask on; dz is as the pass makes it.
void add_dropped(const Tensor& dx, const Tensor& dy, const DyPass& pass, const LinearCall& call, int64_t first) {
  const Mask mask = mask_of(call);
  const Tensor dz = empty_matrix(dy.size(0), dy.size(1), dy.scalar_type());
  pass(dy, dz);
  const Tensor product = base_backward(dz, call.weight);
  in_parallel(dy.size(0), kRowGroup, dx.size(1), [&](int64_t begin, int64_t end) {
    kernels().add_kept(matrix(product), keep_scale(mask), mask, first, matrix(dx), true, begin, end);
  });
}

// dx but for the branch's share, if it is wanted, and the sums of dy * u, if there is a u.
OptionalTensor base_gradients(
    const Tensor& dy, const OptionalTensor& u, const LinearCall& call, const Gain& gain, bool wanted, float* sums) {
  const DyPass pass{gain.g.get(), u, sums};
  if (!wanted) {
    if (u) pass(dy, std::nullopt);
    return std::nullopt;
  }
  if (!call.dropout) {
    const Tensor dz = empty_matrix(dy.size(0), dy.size(1), dy.scalar_type());
    pass(dy, dz);
    return base_backward(dz, call.weight);
  }
  const Tensor dx = base_backward(dy, call.weight);
  const Buffer<float> more = gain.beyond_one(1);
  const int64_t m = dy.size(0), step = rows_at_a_time(std::max(call.n(), call.k()));
  for (int64_t first = 0; first < m; first += step) {
    const auto part = [&](const Tensor& t) { return narrow_rows(t, first, std::min(step, m - first)); };
    const DyPass of_part{more.get(), u ? OptionalTensor(part(*u)) : std::nullopt, sums};
    add_dropped(part(dx), part(dy), of_part, call, first);
  }
  return dx;
}

// scaling * g * dyT xa
Tensor rescaled_gradient_of_b(const Tensor& dy, const Tensor& xa, const LinearCall& call, const Gain& gain) {
  const int64_t stride = round_up(call.r(), kLanes);
  const Buffer<float> q = padded_floats(xa, stride);
  const Sums sums(stride, call.n());
  column_sums(dy, {q.get(), stride}, sums);
  for (int64_t i = 0; i < call.r(); ++i) {
    float* const row = sums.data.get() + i * sums.pitch;
    std::transform(row, row + gain.count, gain.g.get(), row, std::multiplies<>());
  }
  return sums.as_columns(call.r(), call.adapter.b, scale_of(call.adapter));
}

DoraGradients backward(const Tensor& dy, const DoraKept& kept, const DoraCall& call, const DoraWanted& wanted) {
  check_served("dy", dy);
  const LinearCall& linear = call.linear;
  const Tensor rows = left_operand(dy);
  const Gain gain(call.magnitude, kept.norm);
  const Buffer<float> sums(gain.padded);
  std::fill(sums.get(), sums.get() + gain.padded, 0.0f);
  const OptionalTensor u = wanted.dm ? OptionalTensor(as_matrix(*kept.u)) : std::nullopt;
  const OptionalTensor dx = base_gradients(rows, u, linear, gain, wanted.dx, sums.get());
  const auto none = [&] { return not_wanted(dy); };
  DoraGradients gradients{dx ? *dx : none(), none(), none(), none(), none()};
  if (wanted.dx || wanted.da) {
    const Adapter rescaled{linear.adapter.a, gain.times(linear.adapter.b, rows), linear.adapter.scaling_tensor,
                           linear.adapter.scaling};
    const LinearCall beside{linear.weight, rescaled, std::nullopt, linear.dropout};
    gradients.da = add_adapter(gradients.dx, rows, kept.x, beside, {wanted.dx, wanted.da, false, false});
  }
  if (wanted.db) gradients.db = rescaled_gradient_of_b(rows, *kept.xa, linear, gain);
  if (wanted.dbias) gradients.dbias = torch::stable::sum(rows, std::vector<int64_t>{0});
  if (wanted.dm) {
    const Buffer<float> lengths = padded_vector(kept.norm);
    std::transform(sums.get(), sums.get() + gain.count, lengths.get(), sums.get(), std::divides<>());
    gradients.dm = vector_like(call.magnitude, sums.get());
  }
  if (wanted.dx) gradients.dx = shaped_like(dy, gradients.dx);
  return gradients;
}

}  // namespace

}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("lora_dora_linear_forward_cpu",
         TORCH_BOX((&lora_kernels::dora_forward_operator<lora_kernels::forward, lora_kernels::kFormats>)));
  m.impl("lora_dora_linear_backward_cpu",
         TORCH_BOX((&lora_kernels::dora_backward_operator<lora_kernels::backward, lora_kernels::kFormats>)));
}

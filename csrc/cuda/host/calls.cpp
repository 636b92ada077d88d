// A call of the layer: from tensors to plans, parameters and launches; see calls.h.

#include "calls.h"

#include <algorithm>

#include "../../common/arguments.h"
#include "shapes.h"

namespace lora_kernels {

namespace {

constexpr int64_t kMost = 0x7FFFFFFF;  // rows and columns are numbered by int; offsets are 64-bit

Tensor as_matrix(const Tensor& v) {
  Tensor flat = v;
  if (v.dim() != 2) {
    flat = torch::stable::reshape(v, {v.size(-1) ? v.numel() / v.size(-1) : 0, v.size(-1)});
  }
  const bool adjacent = flat.size(1) <= 1 || flat.stride(1) == 1;
  return adjacent ? flat : torch::stable::contiguous(flat);
}

// lora_A and lora_B: in x's type or float32 as they are, in another type rounded to x's.
Tensor adapter(const Tensor& parameter, const Tensor& x) {
  const ScalarType type = parameter.scalar_type();
  if (type == x.scalar_type() || type == ScalarType::Float) return as_matrix(parameter);
  return as_matrix(torch::stable::to(parameter, x.scalar_type()));
}

Rows rows(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0)}; }

bool in_chunks(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(0) * t.element_size() % 16 == 0;
}

// Rows as sm_90's copies take boxes of them: cuTensorMapEncodeTiled takes none that overlap, or lie 2^40 bytes apart.
bool in_boxes(const Tensor& t) {
  return in_chunks(t) && t.stride(0) >= t.size(1) && t.stride(0) < (int64_t{1} << 40) / static_cast<int64_t>(t.element_size());
}

Boxes boxes(const Tensor& t) {
  return {t.mutable_data_ptr(), t.size(0), t.size(1), t.stride(0), kHopperBox, t.scalar_type() == ScalarType::Half};
}

std::vector<int64_t> shape_like(const Tensor& like, int64_t columns) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = columns;
  return sizes;
}

void* data(const Tensor& t) { return t.mutable_data_ptr(); }

// What the kernels' Layer says, and the tensors that it points into.
struct Described {
  Tensor weight, a, b;
  OptionalTensor scaling;
  Layer layer;
};

Described describe(const Tensor& rows_of, const Parameters& p) {
  Described d{as_matrix(p.weight), adapter(p.lora_A, rows_of), adapter(p.lora_B, rows_of), std::nullopt, {}};
  STD_TORCH_CHECK(d.a.scalar_type() == d.b.scalar_type(), "lora_A: expected lora_B's dtype");
  STD_TORCH_CHECK(rows_of.size(0) <= kMost && d.weight.numel() >= 0, "x: expected at most 2^31 - 1 rows");
  if (p.scaling_tensor) d.scaling = torch::stable::to(*p.scaling_tensor, ScalarType::Float);
  Layer& l = d.layer;
  l.m = static_cast<int>(rows_of.size(0));
  l.n = static_cast<int>(d.weight.size(0));
  l.k = static_cast<int>(d.weight.size(1));
  l.r = static_cast<int>(d.a.size(0));
  l.w = rows(d.weight);
  l.a = rows(d.a);
  l.b = rows(d.b);
  l.adapters_are_float = d.a.scalar_type() == ScalarType::Float;
  l.scaling = static_cast<float>(p.scaling);
  l.scaling_pointer = d.scaling ? static_cast<const float*>(data(*d.scaling)) : nullptr;
  l.seed = p.seed ? static_cast<const int64_t*>(data(*p.seed)) : nullptr;
  l.threshold = static_cast<uint32_t>(p.threshold);
  l.lower_bits = (l.threshold & 0x7FFF) * 0x10001;
  l.either = l.threshold < 0x8000 ? ~0u : 0u;
  return d;
}

// torch's switch of float32 products as it is now, which Python knows and the stable interface doesn't.
bool allows_tf32() {
  StableIValue answer[1];
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("lora_kernels::allows_tf32", "", answer, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(answer[0]);
}

Problem problem_of(const Layer& layer, const Tensor& of, bool chunks) {
  Problem p{};
  p.m = layer.m;
  p.n = layer.n;
  p.k = layer.k;
  p.r = layer.r;
  p.type = of.scalar_type() == ScalarType::BFloat16 ? Type::kBf16
           : of.scalar_type() == ScalarType::Half   ? Type::kHalf
           : allows_tf32()                          ? Type::kTf32
                                                    : Type::kFloat;
  p.dropout = layer.seed != nullptr;
  p.in_chunks = chunks;
  return p;
}

Problem backward_problem(const Described& d, const Tensor& dy, const OptionalTensor& x, const std::vector<bool>& needs) {
  Problem p = problem_of(d.layer, dy, in_chunks(dy) && in_chunks(d.weight) && (!x || in_chunks(*x)));
  p.in_boxes = in_boxes(dy) && in_boxes(d.weight) && (!x || in_boxes(*x));
  p.backward = true;
  p.dx = needs[0];
  p.da = needs[1];
  p.db = needs[2];
  p.dbias = needs[3];
  return p;
}

// The last of a call's zeros.
Ticket ticket(const Tensor& zeros, int counters, int numbers, const Launch& how) {
  return {static_cast<int*>(data(zeros)) + counters - 1, numbers, numbers + how.grid - 1};
}

template <class Params>
void launch(const Target& target, const Launch& how, const Params& params) {
  target.launch(how, &params, sizeof params);
}

// Completes the parameters by what the plan asks for, and launches.
void few_rows_call(const Target& target, const Problem& problem, FewRowsParams params, const Tensor& like) {
  const FewRowsPlan plan = few_rows_plan(problem, target.device);
  const Tensor zeros = target.zeros(like, plan.counters), partials = target.empty(like, {plan.partials}, ScalarType::Float);
  target.scratch(partials);
  params.partials = static_cast<float*>(data(partials));
  params.counters = static_cast<int*>(data(zeros));
  params.flag = params.counters + plan.counters - 2;
  params.parts = plan.parts;
  params.ticket = ticket(zeros, plan.counters, plan.numbers, plan.launch);
  launch(target, plan.launch, params);
}

}  // namespace

std::tuple<Tensor, Tensor> forward_call(
    const Tensor& x, const Parameters& parameters, const OptionalTensor& bias, const Target& target) {
  const auto& [weight, lora_A, lora_B, seed, scaling_tensor, scaling, threshold] = parameters;
  arguments::check_forward(x, weight, lora_A, lora_B, bias, seed, scaling_tensor, threshold);
  const Tensor x_rows = as_matrix(x);
  const Described d = describe(x_rows, parameters);
  const Layer& layer = d.layer;
  const Tensor y = target.empty(x, shape_like(x, layer.n), {});
  const Tensor xa = target.empty(x, {layer.m, layer.r}, {});
  if (y.numel() == 0) {
    // Only xa may have numbers here: without rows nothing has, without columns of W it is still asked for.
    STD_TORCH_CHECK(layer.m == 0 || layer.n > 0, "weight: expected at least one row");
    return {y, xa};
  }
  const OptionalTensor added = bias ? OptionalTensor(torch::stable::contiguous(*bias)) : std::nullopt;
  for (const Tensor& t : {x_rows, d.weight, d.a, d.b}) target.scratch(t);
  if (added) target.scratch(*added);
  if (d.scaling) target.scratch(*d.scaling);
  Problem problem = problem_of(layer, x, in_chunks(x_rows) && in_chunks(d.weight));
  problem.in_boxes = in_boxes(x_rows) && in_boxes(d.weight);
  if (has_few_rows(problem)) {
    FewRowsParams params{};
    params.layer = layer;
    params.x = rows(x_rows);
    params.bias = added ? data(*added) : nullptr;
    params.y = data(y);
    params.xa = data(xa);
    few_rows_call(target, problem, params, x);
    return {y, xa};
  }
  const Plan plan = lora_kernels::plan(problem, target.device);
  const Tensor flags = target.zeros(x, plan.counters);
  const Tensor mask = target.empty(x, {plan.words}, ScalarType::Float);  // 32 bits each
  target.scratch(mask);
  const DrawnWords words{static_cast<uint32_t*>(data(mask)), plan.draws, plan.share};
  ForwardParams params{layer, plan.grid, words, rows(x_rows), nullptr, data(y), data(xa), static_cast<int*>(data(flags)), plan.shrink,
                       ticket(flags, plan.counters, plan.numbers, plan.large)};
  if (added) params.bias = data(*added);
  if (plan.sm90a) {
    launch(target, plan.large, HopperForwardParams{target.map(boxes(x_rows)), target.map(boxes(d.weight)), params});
  } else {
    launch(target, plan.large, params);
  }
  return {y, xa};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_call(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& xa, const Parameters& parameters,
    const std::vector<bool>& needs, const Target& target) {
  const auto& [weight, lora_A, lora_B, seed, scaling_tensor, scaling, threshold] = parameters;
  arguments::check_backward(dy, x, xa, weight, lora_A, lora_B, seed, scaling_tensor, threshold, needs);
  const Tensor dy_rows = as_matrix(dy);
  const Described d = describe(dy_rows, parameters);
  const Layer& layer = d.layer;
  const OptionalTensor x_rows = needs[1] ? OptionalTensor(as_matrix(*x)) : std::nullopt;
  const OptionalTensor xa_rows = needs[2] ? OptionalTensor(torch::stable::contiguous(*xa)) : std::nullopt;
  const ScalarType gradients = layer.adapters_are_float ? ScalarType::Float : dy.scalar_type();
  const auto gradient = [&](int which, const std::vector<int64_t>& sizes, ScalarType type) {
    return target.empty(dy, needs[which] ? sizes : std::vector<int64_t>{0}, type);
  };
  const Tensor dx = gradient(0, shape_like(dy, layer.k), dy.scalar_type());
  const Tensor da = gradient(1, {layer.r, layer.k}, gradients);
  const Tensor db = gradient(2, {layer.n, layer.r}, gradients);
  const Tensor dbias = gradient(3, {layer.n}, dy.scalar_type());
  const auto results = std::make_tuple(dx, da, db, dbias);
  if (layer.m == 0) {
    for (Tensor t : {da, db, dbias}) torch::stable::zero_(t);
    return results;
  }
  if (std::none_of(needs.begin(), needs.end(), [](bool need) { return need; })) return results;
  const Plan plan = lora_kernels::plan(backward_problem(d, dy_rows, x_rows, needs), target.device);
  const Tensor counters = target.zeros(dy, plan.counters);
  const Tensor dxa = target.empty(dy, {needs[0] || needs[1] ? layer.m : 0, layer.r}, {});
  const Tensor partials = target.empty(dy, {plan.partials}, ScalarType::Float);
  const bool in_units = dy.scalar_type() == ScalarType::Half && dxa.numel();
  const Tensor units = target.empty(dy, {in_units ? int64_t{plan.grid.panels} * plan.shrink.slices : 0}, ScalarType::Float);
  const int64_t mask_columns = (layer.k + kSumColumns - 1) / kSumColumns * kSumColumns;
  const Tensor mask = target.empty(dy, {plan.mask_rows * mask_columns / 32}, ScalarType::Float);  // 32 bits each
  const auto wanted = [](bool need, const Tensor& t) { return need ? data(t) : nullptr; };
  int* zeros = static_cast<int*>(data(counters));
  const BackwardParams params{
      layer, plan.grid, plan.kinds, rows(dy_rows), x_rows ? rows(*x_rows) : Rows{}, xa_rows ? data(*xa_rows) : nullptr,
      wanted(needs[0] || needs[1], dxa), wanted(needs[0], dx), wanted(needs[1], da), wanted(needs[2], db),
      wanted(needs[3], dbias), layer.adapters_are_float,
      {plan.mask_rows ? static_cast<uint8_t*>(data(mask)) : nullptr, plan.mask_rows},
      static_cast<float*>(data(partials)), zeros, zeros + plan.kinds.db_blocks + plan.kinds.da_blocks, plan.segment, plan.shrink,
      in_units ? static_cast<float*>(data(units)) : nullptr, ticket(counters, plan.counters, plan.numbers, plan.large)};
  for (const Tensor& t : {dy_rows, d.weight, d.a, d.b, dxa, units, partials, mask}) target.scratch(t);
  if (x_rows) target.scratch(*x_rows);
  if (xa_rows) target.scratch(*xa_rows);
  if (d.scaling) target.scratch(*d.scaling);
  if (plan.sm90a) {
    const TensorMap dy_map = target.map(boxes(dy_rows)), x_map = x_rows ? target.map(boxes(*x_rows)) : dy_map;
    launch(target, plan.large, HopperBackwardParams{dy_map, target.map(boxes(d.weight)), x_map, params});
  } else {
    launch(target, plan.large, params);
  }
  return results;
}

}  // namespace lora_kernels

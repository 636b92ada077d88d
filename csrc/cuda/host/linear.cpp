// From a call's tensors to a plan, parameters and a launch; see linear.h.

#include "linear.h"

#include <torch/csrc/stable/ops.h>

#include "../../common/as_matrix.h"
#include "codes.h"
#include "python.h"
#include "shapes.h"
#include "target.h"

namespace lora_kernels {

namespace {

// lora_A or lora_B: in x's type or float32 as they are, in another type rounded to x's.
Tensor factor(const Tensor& parameter, const Tensor& x) {
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

// A contiguous result's; whether its rows can be stored so.
Boxes boxes(void* data, int64_t rows, int64_t columns, Type type) {
  return {data, rows, columns, columns, kHopperBox, type == Type::kHalf};
}
bool can_store(const Boxes& b) { return reinterpret_cast<uintptr_t>(b.data) % 16 == 0 && b.columns % 8 == 0; }

std::vector<int64_t> shape_like(const Tensor& like, int64_t columns) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = columns;
  return sizes;
}

void* data(const Tensor& t) { return t.mutable_data_ptr(); }
void* data(const OptionalTensor& t) { return t ? t->mutable_data_ptr() : nullptr; }

// So many words of 32 bits that a launch writes and reads by itself; none where it needs none: asking torch costs the host 2 us.
OptionalTensor scratch(Target& target, const Tensor& like, int64_t words) {
  return words ? OptionalTensor(target.empty(like, {words}, ScalarType::Float)) : std::nullopt;
}

// A call as kernels read it: tensors of rows, and the Layer that points into them.
struct Prepared {
  Tensor v, a, b;  // v: x or dy
  OptionalTensor weight, scaling;
  std::optional<CodedWeight> codes;  // in the weight's place
  Layer layer;
};

Prepared prepare(const Tensor& v, const LinearCall& call, Target& target) {
  Prepared p{as_matrix(v), factor(call.adapter.a, v), factor(call.adapter.b, v), std::nullopt, std::nullopt, std::nullopt, {}};
  STD_TORCH_CHECK(p.a.scalar_type() == p.b.scalar_type(), "lora_A: expected lora_B's dtype");
  STD_TORCH_CHECK(p.v.size(0) <= kMost, "x: expected at most 2^31 - 1 rows");
  STD_TORCH_CHECK(call.n() <= kMost && call.k() <= kMost, "weight: expected at most 2^31 - 1 rows and columns");
  for (const Tensor& t : {p.v, p.a, p.b}) target.reads(t);
  Layer& l = p.layer;
  l.m = static_cast<int>(p.v.size(0));
  l.n = static_cast<int>(call.n());
  l.k = static_cast<int>(call.k());
  l.r = static_cast<int>(call.r());
  if (call.weight.has_four_bits()) {
    p.codes = coded(call.weight, target);
  } else {
    target.reads(p.weight.emplace(as_matrix(call.weight.matrix)));
    l.w = rows(*p.weight);
  }
  l.a = rows(p.a);
  l.b = rows(p.b);
  l.adapters_are_float = p.a.scalar_type() == ScalarType::Float;
  l.scaling = static_cast<float>(call.adapter.scaling);
  if (const OptionalTensor& scaling = call.adapter.scaling_tensor) {
    p.scaling = torch::stable::to(*scaling, ScalarType::Float);
    target.reads(*p.scaling);
    l.scaling_pointer = static_cast<const float*>(data(*p.scaling));
  }
  if (call.dropout) {
    target.reads(call.dropout->seed);
    l.seed = static_cast<const int64_t*>(data(call.dropout->seed));
    l.threshold = call.dropout->threshold;
  }
  l.lower_bits = (l.threshold & 0x7FFF) * 0x10001;
  l.either = l.threshold < 0x8000 ? ~0u : 0u;
  return p;
}

Type type_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::BFloat16) return Type::kBf16;
  if (t.scalar_type() == ScalarType::Half) return Type::kHalf;
  // By torch's switch of float32 products as it is now.
  return ask_python<bool>("lora_kernels::allows_tf32") ? Type::kTf32 : Type::kFloat;
}

// What is planned, but for what backward wants; x: dA's, if there is one.
Problem problem_of(const Prepared& p, const OptionalTensor& x) {
  Problem problem{};
  problem.m = p.layer.m;
  problem.n = p.layer.n;
  problem.k = p.layer.k;
  problem.r = p.layer.r;
  problem.type = type_of(p.v);
  problem.dropout = p.layer.seed != nullptr;
  problem.store = p.codes ? p.codes->store : Store::kDense;
  problem.in_chunks = in_chunks(p.v) && (!p.weight || in_chunks(*p.weight)) && (!x || in_chunks(*x));
  problem.in_boxes = in_boxes(p.v) && (!p.weight || in_boxes(*p.weight)) && (!x || in_boxes(*x));
  return problem;
}

// Puts W in its codes' place, in memory that lasts for the call, and a rank of zeros where there is none: for kernels of a
// dense W. One that isn't read has no rows.
void make_dense(Prepared& p, Target& target, bool is_read) {
  Layer& l = p.layer;
  p.weight = is_read ? decoded(*p.codes, l.n, l.k, p.v, type_of(p.v), target) : target.empty(p.v, {0, l.k});
  l.w = rows(*p.weight);
  p.codes.reset();
  if (l.r > 0) return;
  p.a = torch::stable::new_zeros(p.v, {1, l.k});
  p.b = torch::stable::new_zeros(p.v, {l.n, 1});
  for (const Tensor& t : {p.a, p.b}) target.reads(t);
  l.a = rows(p.a);
  l.b = rows(p.b);
  l.r = 1;
  l.adapters_are_float = p.v.scalar_type() == ScalarType::Float;
}

// The last of a call's zeros.
Ticket ticket(int* zeros, int counters, int numbers, const Launch& how) {
  return {zeros + counters - 1, numbers, numbers + how.grid - 1};
}

template <class Params>
void launch(Target& target, const Launch& how, const Params& params) {
  target.launch(how, &params, sizeof params);
}

// Completes the parameters by what the plan asks for, and launches.
void launch_few_rows(Target& target, const Prepared& p, const Problem& problem, FewRowsParams params) {
  const FewRowsPlan plan = few_rows_plan(problem, target.device());
  const Tensor zeros = target.zeros(p.v, plan.counters), partials = target.empty(p.v, {plan.partials}, ScalarType::Float);
  params.partials = static_cast<float*>(data(partials));
  params.counters = static_cast<int*>(data(zeros));
  params.flag = params.counters + plan.counters - 2;
  params.parts = plan.parts;
  params.ticket = ticket(params.counters, plan.counters, plan.numbers, plan.launch);
  if (p.codes) {
    launch(target, plan.launch, CodedFewRowsParams{params, p.codes->codes});
  } else {
    launch(target, plan.launch, params);
  }
}

// The same of the large product.
void launch_large(Target& target, const Prepared& p, const Problem& problem, ForwardParams params) {
  const Plan plan = lora_kernels::plan(problem, target.device());
  const Tensor flags = target.zeros(p.v, plan.counters);
  const OptionalTensor mask = scratch(target, p.v, plan.mask_words);
  params.grid = plan.grid;
  params.mask = {static_cast<uint32_t*>(data(mask)), plan.draws, plan.share};
  params.flags = static_cast<int*>(data(flags));
  params.shrink = plan.shrink;
  params.ticket = ticket(params.flags, plan.counters, plan.numbers, plan.large);
  if (plan.sm90a) {
    const Boxes y = boxes(params.y, p.layer.m, p.layer.n, problem.type);
    const TensorMap x_map = target.map(boxes(p.v)), y_map = can_store(y) ? target.map(y) : x_map;
    launch(target, plan.large, HopperForwardParams{x_map, target.map(boxes(*p.weight)), y_map, can_store(y), params});
  } else {
    launch(target, plan.large, params);
  }
}

// The same of backward; x: dA's, if there is one.
void launch_backward(
    Target& target, const Prepared& p, const OptionalTensor& x, const Problem& problem, BackwardParams params) {
  const Layer& layer = p.layer;
  const Plan plan = lora_kernels::plan(problem, target.device());
  const bool shrinks = problem.dx || problem.da, in_units = shrinks && problem.type == Type::kHalf;
  const int64_t mask_columns = (layer.k + kSumColumns - 1) / kSumColumns * kSumColumns;
  const Tensor counters = target.zeros(p.v, plan.counters);
  const Tensor dxa = target.empty(p.v, {shrinks ? layer.m : 0, layer.r});
  const OptionalTensor partials = scratch(target, p.v, plan.partials);
  const OptionalTensor units = scratch(target, p.v, in_units ? int64_t{plan.grid.panels} * plan.shrink.slices : 0);
  const OptionalTensor mask = scratch(target, p.v, plan.mask_rows * mask_columns / 32);
  params.grid = plan.grid;
  params.kinds = plan.kinds;
  params.dxa = shrinks ? data(dxa) : nullptr;
  params.mask = {plan.mask_rows ? static_cast<uint8_t*>(data(mask)) : nullptr, plan.mask_rows};
  params.partials = static_cast<float*>(data(partials));
  params.counters = static_cast<int*>(data(counters));
  params.flags = params.counters + plan.kinds.db_blocks + plan.kinds.da_blocks;
  params.segment = plan.segment;
  params.shrink = plan.shrink;
  params.units = in_units ? static_cast<float*>(data(units)) : nullptr;
  params.ticket = ticket(params.counters, plan.counters, plan.numbers, plan.large);
  if (plan.sm90a) {
    const Boxes dx = boxes(params.dx, layer.m, layer.k, problem.type);
    const TensorMap dy_map = target.map(boxes(p.v)), x_map = x ? target.map(boxes(*x)) : dy_map;
    const TensorMap w_map = target.map(boxes(*p.weight)), dx_map = can_store(dx) ? target.map(dx) : dy_map;
    launch(target, plan.large, HopperBackwardParams{dy_map, w_map, x_map, dx_map, can_store(dx), params});
  } else {
    launch(target, plan.large, params);
  }
}

Tensor in_type_of(const Tensor& parameter, const Tensor& gradient) {
  const ScalarType type = parameter.scalar_type();
  return gradient.scalar_type() == type ? gradient : torch::stable::to(gradient, type);
}

}  // namespace

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const LinearCall& call) {
  const std::unique_ptr<Target> target = target_of(x);
  Prepared p = prepare(x, call, *target);
  const Layer& layer = p.layer;
  const Tensor y = target->empty(x, shape_like(x, layer.n)), no_xa = target->empty(x, {layer.m, 0});
  if (y.numel() == 0) {
    // Only xa may have numbers here: without rows nothing has, without columns of W it is still asked for.
    STD_TORCH_CHECK(layer.m == 0 || layer.n > 0, "weight: expected at least one row");
    return {y, target->empty(x, {layer.m, layer.r})};
  }
  const OptionalTensor bias = call.bias ? OptionalTensor(torch::stable::contiguous(*call.bias)) : std::nullopt;
  if (bias) target->reads(*bias);
  Problem problem = problem_of(p, std::nullopt);
  if (p.codes && !has_few_rows(problem)) {
    make_dense(p, *target, true);
    problem = problem_of(p, std::nullopt);
  }
  const Tensor xa = target->empty(x, {layer.m, layer.r});
  const auto complete = [&](auto params) {
    params.layer = layer;
    params.x = rows(p.v);
    params.bias = bias ? data(*bias) : nullptr;
    params.y = data(y);
    params.xa = data(xa);
    return params;
  };
  if (has_few_rows(problem)) {
    launch_few_rows(*target, p, problem, complete(FewRowsParams{}));
  } else {
    launch_large(*target, p, problem, complete(ForwardParams{}));
  }
  return {y, call.r() > 0 ? xa : no_xa};
}

Gradients linear_backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& xa, const LinearCall& call, const Wanted& wanted) {
  const std::unique_ptr<Target> target = target_of(dy);
  Prepared p = prepare(dy, call, *target);
  const Layer& layer = p.layer;
  const ScalarType type = dy.scalar_type(), adapter_type = layer.adapters_are_float ? ScalarType::Float : type;
  const auto gradient = [&](bool is_wanted, const std::vector<int64_t>& sizes, ScalarType its_type) {
    return target->empty(dy, is_wanted ? sizes : std::vector<int64_t>{0}, its_type);
  };
  const Gradients made{gradient(wanted.dx, shape_like(dy, layer.k), type),
                       gradient(wanted.da, {layer.r, layer.k}, adapter_type),
                       gradient(wanted.db, {layer.n, layer.r}, adapter_type), gradient(wanted.dbias, {layer.n}, type)};
  const bool da = wanted.da && made.da.numel() > 0, db = wanted.db && made.db.numel() > 0;
  if (layer.m == 0) {
    for (Tensor t : {made.da, made.db, made.dbias}) torch::stable::zero_(t);
  } else if (wanted.dx || da || db || wanted.dbias) {
    OptionalTensor x_rows, xa_rows;
    if (da) target->reads(x_rows.emplace(as_matrix(*x)));
    if (db) target->reads(xa_rows.emplace(torch::stable::contiguous(*xa)));
    if (p.codes) make_dense(p, *target, wanted.dx);
    Problem problem = problem_of(p, x_rows);
    problem.backward = true;
    problem.dx = wanted.dx, problem.da = da, problem.db = db, problem.dbias = wanted.dbias;
    BackwardParams params{};
    params.layer = layer;
    params.dy = rows(p.v);
    params.x = x_rows ? rows(*x_rows) : Rows{};
    params.xa = xa_rows ? data(*xa_rows) : nullptr;
    params.dx = wanted.dx ? data(made.dx) : nullptr;
    params.da = da ? data(made.da) : nullptr;
    params.db = db ? data(made.db) : nullptr;
    params.dbias = wanted.dbias ? data(made.dbias) : nullptr;
    params.adapter_gradients_are_float = layer.adapters_are_float;
    launch_backward(*target, p, x_rows, problem, params);
  }
  return {made.dx, in_type_of(call.adapter.a, made.da), in_type_of(call.adapter.b, made.db), made.dbias};
}

}  // namespace lora_kernels

// DoRA's norms, from products with A (R / K of the time of a product with W), in one pass over W:
//
//   n^2 = |w|^2 + 2 s b (A w) + s^2 b (A AT) bT        of a row w of W, b of B
//
// Where W and s B A all but cancel, digits do, too: such rows are formed again as they are. Source: the factored norm of
// arXiv:2603.22276.

#include "norms.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace lora_kernels {

namespace {

// Of |w|^2 + |s b A|^2; its reason stands in lora_kernels/impl/eager/dora.py.
constexpr double kCancelled = 5e-2;
constexpr int64_t kRows = 32;  // of W that are multiplied and squared while they are in L2

struct Terms {
  Matrix w;
  Tensor a;                       // float32
  Panel over_k, over_r;           // of A, for products with rows of W and with those of s B
  Buffer<float> b, own, wa, baa;  // s B; |w|^2; A w; s b A AT
  int64_t pitch;
};

// s b A AT for each row.
void multiply_grams(const Terms& terms) {
  const int64_t r = terms.a.size(0), pitch = terms.pitch, n = terms.w.rows;
  const Matrix a = matrix(terms.a);
  const Buffer<float> grams(r * pitch);
  kernels().rows_product(a, kernels().panel_over_columns(a), 1, grams.get(), {}, 0, r);
  const Panel over_r = kernels().panel_over_rows({grams.get(), pitch, r, r, false});
  in_parallel(n, kRowGroup, r * r, [&](int64_t begin, int64_t end) {
    kernels().rows_product({terms.b.get(), pitch, n, r, false}, over_r, 1, terms.baa.get(), {}, begin, end);
  });
}

// |w|^2 and A w for rows of W, as they are or in float32.
void multiply_rows(const Terms& terms, bool in_floats, int64_t begin, int64_t end) {
  const Matrix& w = terms.w;
  const Buffer<float> wide(in_floats ? kRows * w.columns : 0);
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t count = std::min(kRows, end - first);
    if (in_floats) to_floats(w, first, count, wide.get());
    const Matrix from = in_floats ? Matrix{wide.get(), w.columns, count, w.columns, false} : rows_of(w, first, count);
    kernels().rows_product(from, terms.over_k, 1, terms.wa.get() + first * terms.pitch, {}, 0, count);
    kernels().row_squares(from, terms.own.get() + first, 0, count);
  }
}

// The square of a row that cancels.
float formed_square(const Terms& terms, int64_t row) {
  const int64_t columns = terms.w.columns;
  const Buffer<float> sum(columns);
  to_floats(terms.w, row, 1, sum.get());
  const Matrix one{sum.get(), columns, 1, columns, false};
  kernels().add_low_rank(one, terms.over_r, terms.b.get() + row * terms.pitch, terms.pitch, 0, 1);
  float square = 0;
  kernels().row_squares(one, &square, 0, 1);
  return square;
}

float norm_of(const Terms& terms, int64_t row) {
  const int64_t at = row * terms.pitch, r = terms.a.size(0);
  double crossed = 0, update = 0;
  for (int64_t i = 0; i < r; ++i) {
    const double b = terms.b.get()[at + i];
    crossed += b * terms.wa.get()[at + i];
    update += b * terms.baa.get()[at + i];
  }
  const double own = terms.own.get()[row], square = own + 2 * crossed + update;
  // Not-a-number stays one.
  const bool cancelled = square < kCancelled * (own + update);
  return std::sqrt(cancelled ? formed_square(terms, row) : static_cast<float>(square));
}

}  // namespace

Tensor row_norms(const LinearCall& call, float scale) {
  const Tensor w = as_matrix(call.weight.matrix), a = as_matrix(as_floats(call.adapter.a));
  const int64_t n = w.size(0), r = a.size(0), pitch = round_up(r, kLanes);
  // Pairs of bfloat16 are multiplied where both are.
  const bool in_floats = w.scalar_type() != ScalarType::Float && call.adapter.a.scalar_type() != w.scalar_type();
  const Tensor beside_w = in_floats ? a : factor(call.adapter.a, w);
  const Terms terms{matrix(w), a, kernels().panel_over_columns(matrix(beside_w)), kernels().panel_over_rows(matrix(a)),
                    padded_floats(as_floats(call.adapter.b), pitch), Buffer<float>(n), Buffer<float>(n * pitch),
                    Buffer<float>(n * pitch), pitch};
  std::for_each(terms.b.get(), terms.b.get() + n * pitch, [=](float& v) { v *= scale; });
  multiply_grams(terms);
  const Tensor norm = empty({n}, ScalarType::Float);
  float* const out = static_cast<float*>(norm.mutable_data_ptr());
  in_parallel(n, kRowGroup, pitch * w.size(1), [&](int64_t begin, int64_t end) {
    multiply_rows(terms, in_floats, begin, end);
    for (int64_t i = begin; i < end; ++i) out[i] = norm_of(terms, i);
  });
  return norm;
}

}  // namespace lora_kernels

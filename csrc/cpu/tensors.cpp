// Between torch's tensors and the kernels' matrices; see tensors.h.

#include "tensors.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace lora_kernels {

namespace {

constexpr int64_t kLine = 16;  // numbers of a cache line, which a transposition reads as a whole

float value_of(float number) { return number; }
float value_of(Bf16 number) {
  const uint32_t bits = uint32_t{number.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void assign(float& to, float value) { to = value; }
void assign(Bf16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(value != value ? 0x7FC0 : rounded);
}

// Calls f with the tensor's data as what it is, float* or Bf16*.
template <class F>
void with_data(const Tensor& t, F f) {
  if (t.scalar_type() == ScalarType::BFloat16) return f(static_cast<Bf16*>(t.mutable_data_ptr()));
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "expected float32 or bfloat16");
  f(static_cast<float*>(t.mutable_data_ptr()));
}

// Columns that oneDNN's bf16 products take at a time.
constexpr int64_t kOnednnStep = 32;

// An output of the parameter's type, or of float32 if that isn't one that we write.
Tensor output_like(const Tensor& parameter, int64_t rows, int64_t columns) {
  const ScalarType type = parameter.scalar_type();
  const bool known = type == ScalarType::Float || type == ScalarType::BFloat16;
  return empty_matrix(rows, columns, known ? type : ScalarType::Float);
}

Tensor as_type_of(const Tensor& parameter, const Tensor& t) {
  if (t.scalar_type() == parameter.scalar_type()) return t;
  return torch::stable::to(t, parameter.scalar_type());
}

}  // namespace

Tensor left_operand(const Tensor& v) {
  const Tensor rows = as_matrix(v);
  const bool apart = rows.stride(0) != rows.size(1), whole_steps = rows.size(1) % kOnednnStep == 0;
  const bool read_beyond = apart && !whole_steps && rows.scalar_type() == ScalarType::BFloat16;
  return read_beyond ? torch::stable::contiguous(rows) : rows;
}

void check_served(const char* name, const Tensor& v) {
  const ScalarType type = v.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name, ": expected float32 or bfloat16");
}

Tensor as_floats(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

Tensor factor(const Tensor& parameter, const Tensor& x) { return as_matrix(as_type_of(x, parameter)); }

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<int32_t>(type),
      aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType type) { return empty({rows, columns}, type); }

Tensor not_wanted(const Tensor& v) { return empty({0}, v.scalar_type()); }

Tensor transposed(const Tensor& t) {
  return reinterpreted(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)});
}

Tensor shaped_like(const Tensor& like, const Tensor& flat) {
  if (like.dim() == 2) return flat;
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = flat.size(1);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return reinterpreted(flat, sizes, strides);
}

Matrix matrix(const Tensor& t) {
  const bool is_bf16 = t.scalar_type() == ScalarType::BFloat16;
  return {t.mutable_data_ptr(), t.stride(0), t.size(0), t.size(1), is_bf16};
}

Matrix row_matrix(const Tensor& t) {
  return {t.mutable_data_ptr(), t.numel(), 1, t.numel(), t.scalar_type() == ScalarType::BFloat16};
}

Matrix rows_of(const Matrix& m, int64_t first, int64_t count) {
  const int64_t bytes = m.is_bf16 ? sizeof(Bf16) : sizeof(float);
  return {static_cast<char*>(m.data) + first * m.stride * bytes, m.stride, count, m.columns, m.is_bf16};
}

void to_floats(const Matrix& m, int64_t first, int64_t count, float* out) {
  const auto copy = [&](const auto* data) {
    for (int64_t i = 0; i < count; ++i) {
      const auto* from = data + (first + i) * m.stride;
      for (int64_t c = 0; c < m.columns; ++c) out[i * m.columns + c] = value_of(from[c]);
    }
  };
  m.is_bf16 ? copy(static_cast<const Bf16*>(m.data)) : copy(static_cast<const float*>(m.data));
}

void write_rows(const float* q, int64_t q_stride, const Tensor& out, int64_t begin, int64_t end) {
  const int64_t columns = out.size(1);
  with_data(out, [&](auto* data) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < columns; ++c) assign(data[i * columns + c], q[i * q_stride + c]);
    }
  });
}

void add_floats(const float* numbers, const Tensor& to, int64_t i) {
  const int64_t columns = to.size(1), by_row = to.stride(0);
  with_data(to, [&](auto* data) {
    auto* const row = data + i * by_row;
    for (int64_t c = 0; c < columns; ++c) assign(row[c], value_of(row[c]) + numbers[c]);
  });
}

Tensor vector_like(const Tensor& parameter, const float* numbers) {
  const int64_t count = parameter.numel();
  const Tensor out = output_like(parameter, 1, count);
  write_rows(numbers, count, out, 0, 1);
  return reinterpreted(as_type_of(parameter, out), {count}, {1});
}

Buffer<float> padded_floats(const Tensor& t, int64_t stride) {
  const Tensor source = torch::stable::contiguous(t);
  const int64_t rows = source.size(0), columns = source.size(1);
  Buffer<float> floats(rows * stride);
  with_data(source, [&](const auto* data) {
    in_parallel(rows, 1, columns, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* to = floats.get() + i * stride;
        for (int64_t c = 0; c < columns; ++c) to[c] = value_of(data[i * columns + c]);
        std::fill(to + columns, to + stride, 0.0f);
      }
    });
  });
  return floats;
}

Buffer<float> to_columns(const Tensor& t, int64_t stride) {
  const int64_t rows = t.size(0), columns = t.size(1), by_row = t.stride(0);
  Buffer<float> out(columns * stride);
  with_data(t, [&](const auto* data) {
    for (int64_t first = 0; first < columns; first += kLine) {
      const int64_t last = std::min(first + kLine, columns);
      for (int64_t i = 0; i < stride; ++i) {
        for (int64_t c = first; c < last; ++c) {
          out.get()[c * stride + i] = i < rows ? value_of(data[i * by_row + c]) : 0.0f;
        }
      }
    }
  });
  return out;
}

void column_pass(
    const OptionalTensor& dx, const OptionalTensor& x, const Panel& f, const FloatRows& q, const Mask& mask,
    const Sums& sums) {
  const Matrix none{};
  const Matrix into = dx ? matrix(*dx) : none, from = x ? matrix(*x) : none;
  const Matrix& shape = dx ? into : from;
  float* data = x ? sums.data.get() : nullptr;
  in_parallel(shape.columns, kColumnBlock, shape.rows * q.stride, [&](int64_t begin, int64_t end) {
    kernels().column_pass(into, from, f, q.data, q.stride, data, sums.pitch, mask, begin, end);
  });
}

void column_sums(const Tensor& v, const FloatRows& q, const Sums& sums) {
  column_pass(std::nullopt, v, Panel(0, 0), q, {}, sums);
}

Tensor Sums::as_rows(int64_t rows, const Tensor& parameter, float scale) const {
  const Tensor out = output_like(parameter, rows, columns);
  with_data(out, [&](auto* to) {
    in_parallel(rows, 1, columns, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t c = 0; c < columns; ++c) assign(to[r * columns + c], data.get()[r * pitch + c] * scale);
      }
    });
  });
  return as_type_of(parameter, out);
}

Tensor Sums::as_columns(int64_t rows, const Tensor& parameter, float scale) const {
  const Tensor out = output_like(parameter, columns, rows);
  with_data(out, [&](auto* to) {
    in_parallel(columns, kLine, rows, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += kLine) {
        const int64_t last = std::min(first + kLine, end);
        for (int64_t r = 0; r < rows; ++r) {
          const float* from = data.get() + r * pitch;
          for (int64_t c = first; c < last; ++c) assign(to[c * rows + r], from[c] * scale);
        }
      }
    });
  });
  return as_type_of(parameter, out);
}

}  // namespace lora_kernels

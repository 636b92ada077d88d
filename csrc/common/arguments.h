// What the kernels take on trust about an operator's arguments, checked once for all of them: a parameter may have
// been resized, emptied or cast since Python looked at it, and a kernel that believed its sizes would read past its end.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace lora_kernels {

namespace arguments {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
// What an operator takes of W's format, and of W besides W itself: neither of a dense one.
using Format = std::optional<StringHandle>;
using Parts = std::optional<std::vector<Tensor>>;

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  const char* before = "[";
  for (const int64_t size : t.sizes()) {
    text << before << size;
    before = ", ";
  }
  text << (t.dim() ? "]" : "[]");
  return text.str();
}

// Elements from its storage's begin to the last of a tensor.
inline int64_t elements_spanned(const Tensor& t) {
  int64_t last = t.storage_offset();
  if (t.is_contiguous()) return last + t.numel();
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return last + 1;
}

inline int32_t device_type(const Tensor& t) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

// A dense tensor on the device of `like`, whose memory is there: ZeRO-3 and FSDP empty storages.
inline void check_memory(const char* name, const Tensor& t, const Tensor& like) {
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), name, ": expected a dense tensor, got another layout");
  const int32_t type = device_type(t);
  STD_TORCH_CHECK(
      type == device_type(like) &&
          (type == aoti_torch_device_type_cpu() || t.get_device_index() == like.get_device_index()),
      name, ": expected the device of the other tensors, got another");
  if (t.numel() == 0) return;
  int64_t bytes = 0;
  // A wrapper's data that replaced a parameter's says a size and has no memory.
  if (t.const_data_ptr() != nullptr) TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  STD_TORCH_CHECK(
      bytes >= elements_spanned(t) * static_cast<int64_t>(t.element_size()), name, ": expected memory for shape ",
      shape_of(t), ", got a storage of ", bytes, " bytes");
}

inline void check_size(bool right, const char* name, const char* expected, const Tensor& t) {
  STD_TORCH_CHECK(right, name, ": expected shape ", expected, ", got ", shape_of(t));
}

inline void check_type(const char* name, const Tensor& t, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, ": expected the dtype of the other tensors, got another");
}

inline void check_adapter_type(const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
          type == ScalarType::Double,
      name, ": expected float16, bfloat16, float32 or float64");
}

// An operator's text. Torch's own conversion to std::string loses 32 bytes a call (2.13).
inline std::string taken(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

// The format of W, dense where none is said, is one of those that an implementation reads.
inline void check_format(const Format& handle, const Parts& parts, std::initializer_list<const char*> known) {
  const std::string format = handle ? taken(*handle) : "dense";
  if (std::none_of(known.begin(), known.end(), [&](const char* name) { return format == name; })) {
    std::string names;
    for (const char* name : known) names += (names.empty() ? "" : " or ") + std::string(name);
    STD_TORCH_CHECK(false, "format: expected ", names, ", got ", format);
  }
  STD_TORCH_CHECK(format != "dense" || !parts, "parts: expected none of a dense weight, got some");
}

// The parameters that forward and backward share, beside v: x [..., K] or dy [..., N].
inline void check_parameters(
    const Tensor& v, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const OptionalTensor& seed,
    const OptionalTensor& scaling, int64_t threshold) {
  check_memory("weight", weight, v);
  check_memory("lora_A", lora_A, v);
  check_memory("lora_B", lora_B, v);
  check_size(weight.dim() == 2, "weight", "[N, K]", weight);
  check_size(lora_A.dim() == 2 && lora_A.size(1) == weight.size(1), "lora_A", "[R, K]", lora_A);
  check_size(
      lora_B.dim() == 2 && lora_B.size(0) == weight.size(0) && lora_B.size(1) == lora_A.size(0), "lora_B", "[N, R]",
      lora_B);
  check_size(lora_A.size(0) >= 1, "lora_A", "[R, K] with R of at least 1", lora_A);
  check_type("weight", weight, v.scalar_type());
  check_adapter_type("lora_A", lora_A);
  check_adapter_type("lora_B", lora_B);
  STD_TORCH_CHECK(0 <= threshold && threshold < 65536, "threshold: expected 0 to 65535, got ", threshold);
  if (seed) {
    check_memory("seed", *seed, v);
    check_size(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, "seed", "[] of int64", *seed);
  }
  if (scaling) {
    check_memory("scaling", *scaling, v);
    check_size(scaling->numel() == 1, "scaling", "[]", *scaling);
  }
}

// x [..., K] and bias [N] or none.
inline void check_forward(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const OptionalTensor& bias,
    const OptionalTensor& seed, const OptionalTensor& scaling, int64_t threshold) {
  check_memory("x", x, x);
  check_parameters(x, weight, lora_A, lora_B, seed, scaling, threshold);
  check_size(x.dim() >= 1 && x.size(-1) == weight.size(1), "x", "[..., K]", x);
  if (!bias) return;
  check_memory("bias", *bias, x);
  check_size(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias", "[N]", *bias);
  check_type("bias", *bias, x.scalar_type());
}

// dy [..., N]; x [..., K] and xa [M, R] where the wanted gradients need them.
inline void check_backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& xa, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, const OptionalTensor& seed, const OptionalTensor& scaling, int64_t threshold,
    const std::vector<bool>& wanted) {
  check_memory("dy", dy, dy);
  check_parameters(dy, weight, lora_A, lora_B, seed, scaling, threshold);
  check_size(dy.dim() >= 1 && dy.size(-1) == weight.size(0), "dy", "[..., N]", dy);
  STD_TORCH_CHECK(wanted.size() == 4, "wanted: expected four, got ", wanted.size());
  STD_TORCH_CHECK(x || !wanted[1], "x: expected a tensor, which lora_A's gradient needs, got none");
  STD_TORCH_CHECK(xa || !wanted[2], "xa: expected a tensor, which lora_B's gradient needs, got none");
  const int64_t rows = dy.size(-1) ? dy.numel() / dy.size(-1) : -1;
  if (x) {
    const int64_t columns = weight.size(1);
    check_memory("x", *x, dy);
    check_type("x", *x, dy.scalar_type());
    check_size(x->dim() >= 1 && x->size(-1) == columns, "x", "[..., K]", *x);
    check_size(rows < 0 || x->numel() == rows * columns, "x", "[..., K] with the rows of dy", *x);
  }
  if (xa) {
    check_memory("xa", *xa, dy);
    check_type("xa", *xa, dy.scalar_type());
    check_size(xa->dim() == 2 && xa->size(1) == lora_A.size(0), "xa", "[M, R]", *xa);
    check_size(rows < 0 || xa->size(0) == rows, "xa", "[M, R] with the rows of dy", *xa);
  }
}

}  // namespace arguments

}  // namespace lora_kernels

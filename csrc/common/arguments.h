// What the kernels take on trust about a tensor: a parameter may have been resized, emptied or cast since Python looked at
// it, and a kernel that believed its sizes would read past its end. call.h checks a whole call so.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace lora_kernels {

namespace arguments {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
// As operators have it: none of a dense weight.
using Format = std::optional<StringHandle>;

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

// W's format. Torch's own conversion to std::string loses 32 bytes a call (2.13).
inline std::string taken(const Format& format) {
  if (!format) return "dense";
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(*format, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(*format, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(*format));
  return text;
}

}  // namespace arguments

}  // namespace lora_kernels

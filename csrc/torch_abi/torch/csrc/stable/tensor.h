// A tensor of torch's; see csrc/torch_abi/README.md.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>
#include <span>

namespace torch::headeronly {

// Those that this package asks for, by torch's own numbers.
enum class ScalarType : int8_t {
  Byte = 0, Char = 1, Short = 2, Int = 3, Long = 4, Half = 5, Float = 6, Double = 7, Bool = 11, BFloat16 = 15,
  Float8_e4m3fn = 24, Float8_e8m0fnu = 44, Undefined = 127
};

}  // namespace torch::headeronly

namespace torch::stable {

using torch::headeronly::ScalarType;

namespace detail {

struct Numbered {
  ScalarType type;
  int32_t (*number)();
};

// torch 2.10 and 2.11 have the type and no function for it; numbers are those of ScalarType.
inline int32_t float8_e8m0fnu() { return static_cast<int32_t>(ScalarType::Float8_e8m0fnu); }

// The commonest first.
inline constexpr Numbered kTypes[] = {
    {ScalarType::Float, aoti_torch_dtype_float32}, {ScalarType::BFloat16, aoti_torch_dtype_bfloat16},
    {ScalarType::Half, aoti_torch_dtype_float16},  {ScalarType::Double, aoti_torch_dtype_float64},
    {ScalarType::Long, aoti_torch_dtype_int64},    {ScalarType::Int, aoti_torch_dtype_int32},
    {ScalarType::Short, aoti_torch_dtype_int16},   {ScalarType::Byte, aoti_torch_dtype_uint8},
    {ScalarType::Bool, aoti_torch_dtype_bool},     {ScalarType::Char, aoti_torch_dtype_int8},
    {ScalarType::Float8_e4m3fn, aoti_torch_dtype_float8_e4m3fn},
    {ScalarType::Float8_e8m0fnu, float8_e8m0fnu}};

inline int32_t number_of(ScalarType type) {
  for (const Numbered& known : kTypes) {
    if (known.type == type) return known.number();
  }
  headeronly::detail::throw_error("ScalarType: expected a known one, got ", static_cast<int>(type));
}

inline ScalarType type_of(int32_t number) {
  for (const Numbered& known : kTypes) {
    if (known.number() == number) return known.type;
  }
  return ScalarType::Undefined;
}

}  // namespace detail

// Copies share the handle, which they own.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle)
      : handle_(handle, [](AtenTensorHandle h) { aoti_torch_delete_tensor_object(h); }) {}

  AtenTensorHandle get() const { return handle_.get(); }

  int64_t dim() const { return asked<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return asked<int64_t>(aoti_torch_get_numel); }
  int64_t size(int64_t d) const { return asked<int64_t>(aoti_torch_get_size, d); }
  int64_t stride(int64_t d) const { return asked<int64_t>(aoti_torch_get_stride, d); }
  std::span<const int64_t> sizes() const { return row(aoti_torch_get_sizes); }
  std::span<const int64_t> strides() const { return row(aoti_torch_get_strides); }
  bool is_contiguous() const { return asked<bool>(aoti_torch_is_contiguous); }
  int64_t storage_offset() const { return asked<int64_t>(aoti_torch_get_storage_offset); }
  ScalarType scalar_type() const { return detail::type_of(asked<int32_t>(aoti_torch_get_dtype)); }
  size_t element_size() const { return aoti_torch_dtype_element_size(asked<int32_t>(aoti_torch_get_dtype)); }
  int32_t get_device_index() const { return asked<int32_t>(aoti_torch_get_device_index); }
  bool is_cpu() const { return asked<int32_t>(aoti_torch_get_device_type) == aoti_torch_device_type_cpu(); }
  void* mutable_data_ptr() const { return asked<void*>(torch_get_mutable_data_ptr); }
  const void* const_data_ptr() const { return asked<const void*>(torch_get_const_data_ptr); }

 private:
  std::shared_ptr<AtenTensorOpaque> handle_;

  template <class T, class Function, class... Arguments>
  T asked(Function function, Arguments... arguments) const {
    T answer{};
    TORCH_ERROR_CODE_CHECK(function(get(), arguments..., &answer));
    return answer;
  }

  std::span<const int64_t> row(AOTITorchError (*function)(AtenTensorHandle, int64_t**)) const {
    return {asked<int64_t*>(function), static_cast<size_t>(dim())};
  }
};

}  // namespace torch::stable

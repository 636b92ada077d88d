// Values as they stand on an operator's stack; see csrc/torch_abi/README.md. A value that is taken
// from there is owned by the taker, one that is put there by whoever takes it.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <bit>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace torch::stable::detail {

// Of torch 2.10, whose schemas and conventions these are.
inline constexpr uint64_t kVersion = uint64_t{2} << 56 | uint64_t{10} << 48;

template <class T>
struct Value {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(StableIValue));
  static_assert(std::endian::native == std::endian::little);

  static StableIValue put(T value) {
    StableIValue bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
  }

  static T take(StableIValue bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

template <>
struct Value<ScalarType> {
  static StableIValue put(ScalarType type) { return Value<int32_t>::put(number_of(type)); }
};

template <>
struct Value<Tensor> {
  static StableIValue put(const Tensor& tensor) {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &handle));
    return Value<AtenTensorHandle>::put(handle);
  }

  static Tensor take(StableIValue bits) { return Tensor(Value<AtenTensorHandle>::take(bits)); }
};

// Null, or another value on the heap.
template <class T>
struct Value<std::optional<T>> {
  static StableIValue put(const std::optional<T>& value) {
    return Value<StableIValue*>::put(value ? new StableIValue(Value<T>::put(*value)) : nullptr);
  }

  static std::optional<T> take(StableIValue bits) {
    const std::unique_ptr<StableIValue> inner(Value<StableIValue*>::take(bits));
    if (!inner) return std::nullopt;
    return Value<T>::take(*inner);
  }
};

struct DeleteList {
  void operator()(StableListHandle list) const { torch_delete_list(list); }
};

using OwnedList = std::unique_ptr<StableListOpaque, DeleteList>;

template <class T>
struct Value<std::vector<T>> {
  static StableIValue put(const std::vector<T>& values) {
    StableListHandle made;
    TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(values.size(), &made));
    OwnedList list(made);
    for (const T& value : values) TORCH_ERROR_CODE_CHECK(torch_list_push_back(made, Value<T>::put(value)));
    return Value<StableListHandle>::put(list.release());
  }

  static std::vector<T> take(StableIValue bits) {
    const OwnedList list(Value<StableListHandle>::take(bits));
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list.get(), &size));
    std::vector<T> values;
    values.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list.get(), i, &item));
      values.push_back(Value<T>::take(item));
    }
    return values;
  }
};

template <>
struct Value<std::string> {
  static StableIValue put(const std::string& text) {
    StringHandle handle;
    TORCH_ERROR_CODE_CHECK(torch_new_string_handle(text.data(), text.size(), &handle));
    return Value<StringHandle>::put(handle);
  }
};

}  // namespace torch::stable::detail

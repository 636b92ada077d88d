// Registration of implementations; see csrc/torch_abi/README.md.

#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <tuple>
#include <utility>

namespace torch::stable::detail {

// A function that takes its arguments from a stack and puts its results there.
template <auto function>
struct Boxed;

template <class T>
void put_results(StableIValue* stack, const T& result) {
  stack[0] = Value<T>::put(result);
}

template <class... Results>
void put_results(StableIValue* stack, const std::tuple<Results...>& results) {
  std::apply([stack](const Results&... r) { size_t i = 0; ((stack[i++] = Value<Results>::put(r)), ...); }, results);
}

template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t count, uint64_t) {
    STD_TORCH_CHECK(count == sizeof...(Parameters), "expected ", sizeof...(Parameters), " arguments, got ", count);
    auto arguments = taken(stack, std::index_sequence_for<Parameters...>());
    if constexpr (std::is_void_v<Result>) {
      std::apply(function, std::move(arguments));
    } else {
      put_results(stack, std::apply(function, std::move(arguments)));
    }
  }

 private:
  template <size_t... I>
  static std::tuple<std::decay_t<Parameters>...> taken(const StableIValue* stack, std::index_sequence<I...>) {
    return {Value<std::decay_t<Parameters>>::take(stack[I])...};
  }
};

// Implementations for one dispatch key, unregistered with the library.
class StableLibrary {
 public:
  StableLibrary(const char* name, const char* key, const char* file, uint32_t line, void (*fill)(StableLibrary&)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_impl(name, key, file, line, &handle_));
    fill(*this);
  }
  ~StableLibrary() { aoti_torch_delete_library_object(handle_); }
  StableLibrary(const StableLibrary&) = delete;

  void impl(const char* name, void (*function)(StableIValue*, uint64_t, uint64_t)) {
    TORCH_ERROR_CODE_CHECK(torch_library_impl(handle_, name, function, kVersion));
  }

 private:
  TorchLibraryHandle handle_;
};

}  // namespace torch::stable::detail

#define TORCH_BOX(function) (torch::stable::detail::Boxed<(function)>::call)

#define STABLE_TORCH_LIBRARY_IMPL(library, key, m)                                                            \
  static void implement_##library##_##key(torch::stable::detail::StableLibrary&);                             \
  static const torch::stable::detail::StableLibrary implementations_##library##_##key(                        \
      #library, #key, __FILE__, __LINE__, implement_##library##_##key);                                       \
  static void implement_##library##_##key(torch::stable::detail::StableLibrary& m)

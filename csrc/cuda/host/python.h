// What the host side asks of Python, which the stable interface doesn't know: by operators that Python defines
// (lora_kernels/registration.py).

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <type_traits>

namespace lora_kernels {

template <class Result, class... Arguments>
Result ask_python(const char* name, const Arguments&... arguments) {
  StableIValue stack[sizeof...(Arguments) + 1] = {torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  if constexpr (!std::is_void_v<Result>) return torch::stable::detail::to<Result>(stack[0]);
}

}  // namespace lora_kernels

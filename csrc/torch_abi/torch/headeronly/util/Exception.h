// Errors of calls into torch and of our own checks; see csrc/torch_abi/README.md.

#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace torch::headeronly::detail {

template <class... Parts>
[[noreturn, gnu::noinline]] void throw_error(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace torch::headeronly::detail

// The condition, then what the message is put together of.
#define STD_TORCH_CHECK(condition, ...)                                                                             \
  do {                                                                                                              \
    if (__builtin_expect(!(condition), 0)) {                                                                        \
      torch::headeronly::detail::throw_error(__func__, ", ", __FILE__, ":", __LINE__, ", " __VA_OPT__(, ) __VA_ARGS__); \
    }                                                                                                               \
  } while (0)

#define TORCH_ERROR_CODE_CHECK(call)                                                                    \
  do {                                                                                                  \
    if (__builtin_expect((call) != 0, 0)) {                                                             \
      torch::headeronly::detail::throw_error(#call " API call failed at ", __FILE__, ", line ", __LINE__); \
    }                                                                                                   \
  } while (0)

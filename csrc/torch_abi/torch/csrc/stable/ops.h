// Operators of torch's; see csrc/torch_abi/README.md.

#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

namespace torch::stable {

namespace detail {

template <class... Arguments>
Tensor called(const char* name, const char* overload, const Arguments&... arguments) {
  StableIValue stack[] = {Value<Arguments>::put(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, kVersion));
  return Value<Tensor>::take(stack[0]);
}

}  // namespace detail

using OptionalType = std::optional<ScalarType>;
using None = std::optional<int64_t>;  // of any type, where it is absent

inline Tensor to(const Tensor& t, ScalarType type) {
  return detail::called("aten::to", "dtype", t, type, false, false, None());
}

inline Tensor contiguous(const Tensor& t) {
  return detail::called("aten::contiguous", "", t, aoti_torch_memory_format_contiguous_format());
}

inline Tensor reshape(const Tensor& t, const std::vector<int64_t>& shape) {
  return detail::called("aten::reshape", "", t, shape);
}

inline Tensor new_empty(const Tensor& t, const std::vector<int64_t>& sizes, OptionalType type = std::nullopt) {
  return detail::called("aten::new_empty", "", t, sizes, type, None(), None(), None());
}

inline Tensor sum(const Tensor& t, const std::vector<int64_t>& dims) {
  return detail::called("aten::sum", "dim_IntList", t, std::optional(dims), false, OptionalType());
}

inline Tensor narrow(const Tensor& t, int64_t dim, int64_t start, int64_t length) {
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_narrow(t.get(), dim, start, length, &view));
  return Tensor(view);
}

// Calls f(begin, end) for parts of a range, of `grain` at least, by torch's threads.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const auto part = [](int64_t first, int64_t last, void* context) { (*static_cast<const F*>(context))(first, last); };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, part, const_cast<F*>(&f)));
}

}  // namespace torch::stable

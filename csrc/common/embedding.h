// An embedding call's tensors by name, as lora_kernels/operands/embedding.py has them: made of an operator's arguments once, and
// checked there.

#pragma once

#include <torch/csrc/stable/ops.h>

#include "call.h"
#include "grouped.h"

namespace lora_kernels {

// y[m] = (W[ids[m]] + scaling * A[:, ids[m]]T BT) * embed_scale; W [V, H], which backward doesn't read, A [R, V], B [H, R].
struct EmbeddingCall {
  OptionalTensor weight;
  Adapter adapter;
  int64_t padding_idx;  // the id whose column of A gets no gradient, or -1
  OptionalTensor embed_scale;
  std::vector<int64_t> ids;

  int64_t rows() const { return static_cast<int64_t>(ids.size()); }
  int64_t v() const { return adapter.a.size(1); }
  int64_t h() const { return adapter.b.size(0); }
  int64_t r() const { return adapter.a.size(0); }
};

namespace arguments {

// Both directions, beside v, W or dy; reads the ids, each a row of W.
inline void check_embedding(const Tensor& ids, const Tensor& v, EmbeddingCall& call) {
  const Tensor &a = call.adapter.a, &b = call.adapter.b;
  check_memory("lora_embedding_A", a, v);
  check_memory("lora_embedding_B", b, v);
  check_size(a.dim() == 2 && a.size(0) >= 1, "lora_embedding_A", "[R, V]", a);
  check_size(b.dim() == 2 && b.size(1) == call.r(), "lora_embedding_B", "[H, R]", b);
  check_adapter_type("lora_embedding_A", a);
  check_adapter_type("lora_embedding_B", b);
  check_number("scaling", call.adapter.scaling_tensor, v);
  check_number("embed_scale", call.embed_scale, v);
  check_memory("ids", ids, v);
  call.ids = integers("ids", torch::stable::reshape(ids, {ids.numel()}), 0, call.v(), v);
}

}  // namespace arguments

}  // namespace lora_kernels

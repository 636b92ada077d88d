"""PEFT's LoRA embedding with a fused forward; imported only when a model is patched."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding
from torch import Tensor, nn

from lora_kernels._peft.fused import Fused, active_adapter
from lora_kernels.bypass import (
    everywhere_reason,
    origin,
    read_plain,
    scaling_reason,
    tensors_reason,
)
from lora_kernels.operands.call import Adapter
from lora_kernels.operands.embedding import NO_PADDING, EmbeddingCall
from lora_kernels.operands.weight import Dense
from lora_kernels.ops.embedding import UNSERVED_OPTIONS, check, lora_embedding


class FusedEmbedding(Fused, Embedding):
    """PEFT's `lora.Embedding`, computed by `lora_embedding` unless there is a reason not to."""

    _lora_kernels_theirs = Embedding
    _lora_kernels_op = "lora_embedding"

    def _lora_kernels_left(self) -> str | None:
        parts = fused_parts(self)
        return parts if isinstance(parts, str) else None

    def _fused_call(self, x: Any, impl: str) -> Callable[[], Tensor] | str:
        parts = fused_parts(self)
        if isinstance(parts, str):
            return parts
        weight, a, b, scaling, options = parts
        reason = tensors_reason(x=x, weight=weight, lora_embedding_A=a, lora_embedding_B=b)
        if reason is not None:
            return reason
        try:
            check(x, EmbeddingCall(Dense(weight), Adapter(a, b, scaling), NO_PADDING, None))
        except (TypeError, ValueError) as error:
            return str(error)
        return partial(lora_embedding, x, weight, a, b, scaling=scaling, impl=impl, **options)


Parts = tuple[Tensor, Tensor, Tensor, float | Tensor, dict[str, Any]]


def fused_parts(layer: Embedding) -> Parts | str:
    """Return what a fused call needs, or why the layer keeps PEFT's forward in its present state.

    W, A, B, scaling, and `lora_embedding`'s padding_idx and embed_scale.
    """
    name, reason = active_adapter(layer, layer.lora_embedding_A, Embedding.forward)
    if name is None:
        return str(reason)
    fns = (vars(layer).get(which, {}).get(name) for which in ("input_fns", "output_fns"))
    if any(f is not None for f in fns):
        return "tensor parallel"
    base = layer.base_layer
    scale = _embed_scale(base)
    if isinstance(scale, str):
        return f"base layer {scale}"
    read = read_plain(base, type(base) if scale is not None else nn.Embedding)
    if isinstance(read, str):
        return f"base layer {read}"
    found = next((option for option in UNSERVED_OPTIONS if getattr(base, option)), None)
    if found is not None:
        return f"base layer has {found}"
    reason = everywhere_reason() or scaling_reason(layer.scaling[name])
    if reason is not None:
        return reason
    a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    if a.dtype != b.dtype:
        return f"lora_embedding_A is {a.dtype}, lora_embedding_B {b.dtype}"
    options = {"padding_idx": base.padding_idx, "embed_scale": scale}
    scaling = layer.scaling[name]
    # A number that `lora_embedding` doesn't take, such as numpy's, is one that PEFT multiplies by.
    scaling = scaling if isinstance(scaling, Tensor | float) else float(scaling)
    return read[0], a, b, scaling, options


def _embed_scale(base: Any) -> Tensor | float | str | None:
    """Return the factor of one of transformers' scaled embeddings, None of torch's; or a reason."""
    if type(base).forward is nn.Embedding.forward and not hasattr(base, "embed_scale"):
        return None
    kind = type(base)
    scaled = kind.__name__.endswith("ScaledWordEmbedding") and issubclass(kind, nn.Embedding)
    if not (scaled and origin(kind.forward).startswith("transformers.models.")):
        return f"is {kind.__name__}, not torch.nn.Embedding"
    scale = base.embed_scale
    if isinstance(scale, Tensor):
        if scale.ndim or scale.requires_grad:
            return f"has an embed_scale of shape {list(scale.shape)}"
        return scale
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        return f"has an embed_scale that is a {type(scale).__name__}"
    exact = torch.tensor(scale, dtype=base.weight.dtype).item() == scale
    return float(scale) if exact else f"has an embed_scale that isn't of {base.weight.dtype}"

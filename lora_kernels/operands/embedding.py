"""A LoRA embedding's tensors by name."""

from typing import Any, NamedTuple

from torch import Tensor

from lora_kernels.operands.call import Adapter
from lora_kernels.operands.weight import Dense, Weight

NO_PADDING = -1


class EmbeddingCall(NamedTuple):
    """y = (W[ids] + scaling · Aᵀ[ids] Bᵀ) · embed_scale, but for ids.

    W [V, H], None in backward, which doesn't read it; A [R, V], B [H, R]; padding_idx, whose column
    of A gets no gradient, is NO_PADDING where there is none; embed_scale is 0-dim or None.
    """

    weight: Weight | None
    adapter: Adapter
    padding_idx: int
    embed_scale: Tensor | None

    @property
    def factor(self) -> float | Tensor:
        """What the branch is multiplied by: scaling · embed_scale."""
        scaling = self.adapter.scaling
        return scaling if self.embed_scale is None else self.embed_scale * scaling

    def flat(self) -> tuple[Any, ...]:
        """Return what a backward operator takes after ids, a forward operator after W."""
        _, adapter, padding_idx, embed_scale = self
        return adapter.a, adapter.b, *adapter.flat_scaling(), padding_idx, embed_scale


def embedding_call_of(weight: Tensor | None, *flat: Any) -> EmbeddingCall:
    """Return the call that an operator was given."""
    a, b, tensor, number, padding_idx, embed_scale = flat
    adapter = Adapter(a, b, number if tensor is None else tensor)
    dense = None if weight is None else Dense(weight)
    return EmbeddingCall(dense, adapter, padding_idx, embed_scale)

"""The layers that an adapter's file may name: their tensors there, and how one is made.

A part is what a tensor's key says after the layer's path, such as "lora_A.weight".
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from lora_kernels.adapter_experts import PAIR, is_experts, owner_of_part, shapes_of_experts
from lora_kernels.nn import (
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAEmbedding,
    LoRAExperts,
    LoRALinear,
)
from lora_kernels.nn.adapted import Adapted
from lora_kernels.nn.arguments import check_linear
from lora_kernels.nn.conv import check_conv
from lora_kernels.nn.embedding import check_embedding
from lora_kernels.nn.experts import check_experts

EMBEDDING_PAIR = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"  # PEFT's files leave out ".weight" here
PARTS = (*PAIR, MAGNITUDE, *EMBEDDING_PAIR)


class Kind(NamedTuple):
    """A kind of adapted layer.

    is_plain: whether a layer may be put around a module. maker: the class method that puts it
    there, given r, adapter_dtype and `settings`. check: raises unless it may, given the module, r
    and use_dora.
    """

    adapted: type[Adapted]
    is_plain: Callable[[nn.Module], bool]
    maker: str
    settings: tuple[str, ...]
    check: Callable[[Any, int, bool], None]

    def make(self, plain: nn.Module, **settings: Any) -> Any:
        """Return an adapted layer around a plain one."""
        return getattr(self.adapted, self.maker)(plain, **settings)


_SHARED = ("lora_alpha", "use_rslora")
_DROPPING = (*_SHARED, "lora_dropout", "bias")
_CONVS: tuple[tuple[Any, Any], ...] = (
    (LoRAConv1d, nn.Conv1d),
    (LoRAConv2d, nn.Conv2d),
    (LoRAConv3d, nn.Conv3d),
)


def _check_linear(linear: nn.Module, rank: int, use_dora: bool) -> None:
    check_linear(linear, use_dora=use_dora)


def _check_embedding(embedding: nn.Module, rank: int, use_dora: bool) -> None:
    check_embedding(embedding)


def _check_conv(kind: Any, conv: Any, rank: int, use_dora: bool) -> None:
    check_conv(conv, kind, rank)


def _check_experts(experts: Any, rank: int, use_dora: bool) -> None:
    check_experts(experts, None)


def _is_a(kind: type[nn.Module], module: nn.Module) -> bool:
    return isinstance(module, kind)


_LINEAR = partial(_is_a, nn.Linear), "from_linear", (*_DROPPING, "use_dora")
_EXPERTS = is_experts, "from_experts", (*_SHARED, "lora_dropout", "target_parameters")
KINDS = (
    Kind(LoRALinear, *_LINEAR, _check_linear),
    Kind(LoRAEmbedding, partial(_is_a, nn.Embedding), "from_embedding", _SHARED, _check_embedding),
    *(
        Kind(ours, partial(_is_a, plain), "from_conv", _DROPPING, partial(_check_conv, plain))
        for ours, plain in _CONVS
    ),
    Kind(LoRAExperts, *_EXPERTS, _check_experts),
)


def kind_of(layer: nn.Module) -> Kind | None:
    """Return what kind of layer is adapted, or may be; None of another."""
    for kind in KINDS:
        if isinstance(layer, kind.adapted) or kind.is_plain(layer):
            return kind
    return None


def shapes_of(
    layer: Any, rank: int, use_dora: bool, parameters: Sequence[str] = ()
) -> dict[str, list[int]]:
    """Return the shape of each tensor that a file has of a layer, adapted or plain, by part.

    parameters: those of plain experts that are adapted.
    """
    base: Any = layer.base_layer if isinstance(layer, Adapted) else layer
    if isinstance(layer, LoRAExperts) or is_experts(base):
        return shapes_of_experts(base, rank, getattr(layer, "lora_A", parameters))
    if isinstance(base, nn.Embedding):
        shapes = [rank, base.num_embeddings], [base.embedding_dim, rank]
        return dict(zip(EMBEDDING_PAIR, shapes, strict=True))
    if hasattr(base, "kernel_size"):
        ones = [1] * len(base.kernel_size)
        b = [base.out_channels, rank // base.groups, *ones]
        return dict(zip(PAIR, ([rank, base.in_channels, *base.kernel_size], b), strict=True))
    shapes = [rank, base.in_features], [base.out_features, rank]
    own = dict(zip(PAIR, shapes, strict=True))
    return {**own, MAGNITUDE: [base.out_features]} if use_dora else own


def owner_of(layer: Any, part: str) -> tuple[Any, str]:
    """Return the module that has a part's parameter, and the name it has there."""
    if isinstance(layer, LoRAExperts):
        return owner_of_part(layer, part)
    name, _, attribute = part.partition(".")
    held = getattr(layer, name)
    return (held, attribute or "weight") if isinstance(held, nn.Module) else (layer, name)


def uses_dora(layer: Any) -> bool:
    """Whether an adapted layer has a magnitude."""
    return bool(getattr(layer, "use_dora", False))

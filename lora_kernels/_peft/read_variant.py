"""What a fused call reads of a variant of LoRA: DoRA's magnitude, what KaSA has between A and B."""

from typing import Any

from torch import Tensor

from lora_kernels._peft.dora import read_magnitude
from lora_kernels._peft.variants import variant_reason
from lora_kernels.bypass import PLAIN_TENSORS, origin
from lora_kernels.checks import check_memory

_VARIANTS = "peft.tuners.lora.variants"


def read_variant(layer: Any, name: str) -> tuple[Tensor | None, Tensor | None] | str:
    """Return the magnitude and diagonal of a layer's adapter, or why PEFT's forward is kept."""
    variant = layer.lora_variant.get(name)
    kind = type(variant).__name__
    if kind in ("MiCALinearVariant", "KasaLinearVariant"):
        if origin(variant.forward) != _VARIANTS:
            return variant_reason(variant)
        # MiCA's forward is LoRA's; it freezes lora_B.
        diagonal = _read_diagonal(layer, name) if kind == "KasaLinearVariant" else None
        return diagonal if isinstance(diagonal, str) else (None, diagonal)
    magnitude = read_magnitude(layer, name)
    return magnitude if isinstance(magnitude, str) else (magnitude, None)


def times_diagonal(lora_B: Tensor, diagonal: Tensor) -> Tensor | str:
    """Return B diag(d), whose gradient autograd takes apart, or why PEFT's forward is kept."""
    if diagonal.dtype != lora_B.dtype or diagonal.device != lora_B.device:
        return f"lora_diag is {diagonal.dtype} on {diagonal.device}, unlike lora_B"
    if diagonal.shape != lora_B.shape[1:]:
        return f"lora_diag has shape {list(diagonal.shape)}, lora_B {list(lora_B.shape)}"
    check_memory(lora_diag=diagonal, lora_B=lora_B)
    return lora_B * diagonal


def _read_diagonal(layer: Any, name: str) -> Tensor | str:
    if name in layer._lora_kasa_truncation_deferred:
        return "KaSA truncates the base weight in its first call"
    diagonal = layer._modules["lora_diag"]._parameters.get(name)
    if type(diagonal) not in PLAIN_TENSORS:
        return f"lora_diag is a {type(diagonal).__name__}"
    return diagonal

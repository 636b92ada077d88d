"""Several active adapters of one layer, which PEFT sums, as one adapter of all their ranks::

    Σᵢ sᵢ · x Aᵢᵀ Bᵢᵀ = x [A₁; A₂; ...]ᵀ [s₁ B₁, s₂ B₂, ...]ᵀ

One fused call computes the sum, and autograd takes the gradients of the concatenated factors apart.
PEFT draws a mask for each adapter: where something is dropped, the layer keeps PEFT's forward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.bypass import PLAIN_TENSORS, dropout_reason, inference_reason, read_linear
from lora_kernels.checks import check_memory

MOST_RANKS = 256  # together: kernels take no more

SummedParts = tuple[Any, Tensor | None, Tensor, Tensor, nn.Module, float, None]


def summed_parts(layer: Any, names: list[str], read: Callable[[Any], Any]) -> SummedParts | str:
    """Return what a fused call of several adapters needs, or why they are left to PEFT.

    In the order of `FusedParts`. read: of the base layer.
    """
    found = _factors(layer, names)
    if isinstance(found, str):
        return f"{len(names)} active adapters: {found}"
    own = read(layer._modules["base_layer"])
    if isinstance(own, str):
        return f"base layer {own}"
    all_a, all_b, dropout = found
    scalings = [layer.scaling[name] for name in names]
    scaling = scalings[0]
    if any(s != scaling for s in scalings):
        # Rounded with the product alone: a 16-bit factor times a number would be rounded before.
        wide = [b.float() if b.dtype.itemsize == 2 else b for b in all_b]
        all_b, scaling = [b * s for b, s in zip(wide, scalings, strict=True)], 1.0
        all_a = [a.to(all_b[0].dtype) for a in all_a]
    return *own, joined(all_a, 0), joined(all_b, 1), dropout, scaling, None


def joined(factors: list[Tensor], dim: int) -> Tensor:
    """Return factors one after the other, in their own dtype.

    Under autocast torch.cat looks for a common one, and raises for float16 on CPUs.
    """
    device = factors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return torch.cat(factors, dim)
    with torch.autocast(device, enabled=False):
        return torch.cat(factors, dim)


def _factors(layer: Any, names: list[str]) -> tuple[list[Tensor], list[Tensor], nn.Module] | str:
    """Return each adapter's A and B and a dropout that drops nothing, or why there are none."""
    modules, found = layer._modules, []
    for name in names:
        if name in layer.lora_variant or layer.use_dora.get(name):
            return f"{name!r} is another variant of LoRA"
        dropout = modules["lora_dropout"]._modules[name]
        reason = dropout_reason(dropout)
        if reason is not None:
            return reason
        if isinstance(dropout, nn.Dropout) and dropout.p and dropout.training:
            return "each has a dropout mask"
        scaling = layer.scaling[name]
        if type(scaling) is not float or scaling - scaling != 0.0:
            return f"the scaling of {name!r} is {scaling}"
        for factor in ("lora_A", "lora_B"):
            own = read_linear(modules[factor]._modules[name])
            if isinstance(own, str):
                return f"{factor} {own}"
            if own[1] is not None:
                return f"{factor} has a bias"
            found.append(own[0])
    all_a, all_b = found[::2], found[1::2]
    reason = _misfit(all_a, all_b)
    return (all_a, all_b, dropout) if reason is None else reason


def _misfit(all_a: list[Tensor], all_b: list[Tensor]) -> str | None:
    """Return why factors can't be concatenated, or None.

    torch.cat leaves out what was emptied, and PEFT's own products refuse it.
    """
    first_a, first_b = all_a[0], all_b[0]
    for a, b in zip(all_a, all_b, strict=True):
        for name, t in (("lora_A", a), ("lora_B", b)):
            if type(t) not in PLAIN_TENSORS or t.is_meta or t.ndim != 2:
                return f"a {name} is no plain matrix"
            if t.dtype != first_a.dtype or t.device != first_a.device:
                return "their dtypes or devices differ"
        if a.shape[1] != first_a.shape[1] or b.shape != (first_b.shape[0], a.shape[0]):
            return "their sizes don't fit"
        check_memory(lora_A=a, lora_B=b)
    reason = inference_reason(*all_a, *all_b)
    if reason is not None:
        return reason
    if sum(a.shape[0] for a in all_a) > MOST_RANKS:
        return f"their ranks are more than {MOST_RANKS} together"
    return None

"""PEFT's LoRA linear layer with a fused forward; imported only when a model is patched.

A patched layer keeps its `__dict__` and changes its class to `FusedLinear`, which is importable by
name: so deep copies, pickles, hooks, isinstance checks and every other method of PEFT's go on
working, and a call that the fused path does not cover is `super().forward`, PEFT's own.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from lora_kernels.bypass import PLAIN_TENSORS, dropout_reason, everywhere_reason, read_linear
from lora_kernels.checks import FLOAT_DTYPES, is_dtensor
from lora_kernels.functional import autocast_dtype, checked_lora_linear
from lora_kernels.packing import Packed, current


class FusedLinear(Linear):
    """PEFT's `lora.Linear`, computed by `lora_linear` unless `fused_parts` gives a reason."""

    _lora_kernels_impl: str
    _lora_kernels_packed: Packed | None = None  # set by `prepack_`

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted layer's output; arguments as PEFT's forward."""
        # A wrapper may hold this bound method beyond `unpatch_peft`, a thread may be in it.
        impl: str | None = getattr(self, "_lora_kernels_impl", None)
        parts = "not patched" if impl is None else fused_parts(self)
        if impl is None or args or kwargs or isinstance(parts, str) or not _fits(parts.weight, x):
            return Linear.forward(self, x, *args, **kwargs)
        bias, scaling, dropout = parts.bias, parts.scaling, parts.dropout
        if parts.lora_bias is not None:
            # y = x Wᵀ + (bias + scaling · lora_bias) + ...: autograd splits the gradient again.
            scaled = parts.lora_bias * scaling
            bias = (scaled if bias is None else bias + scaled).to(parts.weight.dtype)
        p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        return checked_lora_linear(
            x,
            parts.weight,
            parts.lora_A,
            parts.lora_B,
            bias,
            scaling,
            p,
            None,
            impl,
            autocast_dtype(x),
            current(self, parts.weight),
        )

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge as PEFT does; it writes where the weight's version doesn't tell."""
        self._lora_kernels_packed = None
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        """Unmerge as PEFT does."""
        self._lora_kernels_packed = None
        super().unmerge()


class FusedParts(NamedTuple):
    """What a fused call reads from a layer."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    dropout: nn.Module
    scaling: float | Tensor


def fused_parts(layer: Linear) -> FusedParts | str:
    """Return what a fused call needs, or why the layer keeps PEFT's forward in its present state.

    Runs at every call, so it reads `_modules` and `_parameters` themselves: an attribute of an
    nn.Module costs up to 1 µs, and through attributes this took 25 µs.
    """
    if layer._disable_adapters:
        return "adapters disabled"
    if layer.merged_adapters:
        return f"merged: {', '.join(layer.merged_adapters)}"
    modules: dict[str, Any] = layer._modules
    adapters, active = modules["lora_A"]._modules, layer._active_adapter
    names = [active] if isinstance(active, str) else active
    names = [name for name in names if name in adapters]
    if len(names) != 1:
        return f"{len(names)} active adapters, one is fused" if names else "no active adapter"
    name = names[0]
    if name in layer.lora_variant or layer.use_dora.get(name):
        variant = layer.lora_variant.get(name)
        return f"LoRA variant {type(variant).__name__}" if variant is not None else "DoRA"
    base, dropout = modules["base_layer"], modules["lora_dropout"]._modules[name]
    lora_A, lora_B = adapters[name], modules["lora_B"]._modules[name]
    own, a, b = read_linear(base), read_linear(lora_A), read_linear(lora_B)
    if isinstance(own, str):
        return f"base layer {own}"
    if isinstance(a, str):
        return f"lora_A {a}"
    if isinstance(b, str):
        return f"lora_B {b}"
    if a[1] is not None:
        return "lora_A has a bias"
    reason = dropout_reason(dropout) or everywhere_reason()
    if reason is not None:
        return reason
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor) and scaling.requires_grad:
        return "scaling requires grad"
    return FusedParts(*own, a[0], *b, dropout, scaling)


def left_reason(layer: Linear) -> str | None:
    """Return why a layer keeps PEFT's forward in its present state; None where it is fused."""
    parts = fused_parts(layer)
    return parts if isinstance(parts, str) else None


def _fits(weight: Tensor, x: Tensor) -> bool:
    """Whether x is what the fused path takes; what is not is PEFT's to compute or to refuse."""
    if type(x) not in PLAIN_TENSORS and not is_dtensor(x):
        return False
    if is_dtensor(x) != is_dtensor(weight) or x.dtype not in FLOAT_DTYPES or x.is_meta:
        return False
    if x.device != weight.device or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        return False
    return x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)

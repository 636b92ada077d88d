"""PEFT's LoRA linear layer with a fused forward; imported only when a model is patched.

A patched layer keeps its `__dict__` and changes its class to `FusedLinear`, which is importable by
name: so deep copies, pickles, hooks, isinstance checks and every other method of PEFT's go on
working, and a call that the fused path does not cover is `super().forward`, PEFT's own.
"""

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from lora_kernels.checks import FLOAT_DTYPES
from lora_kernels.functional import lora_linear

_PLAIN_TENSORS = (Tensor, nn.Parameter)


class FusedLinear(Linear):
    """PEFT's `lora.Linear`; its forward is `lora_linear` wherever `left_reason` returns None."""

    _lora_kernels_impl: str
    base_layer: nn.Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted layer's output; arguments as PEFT's forward."""
        # A wrapper may hold this bound method beyond `unpatch_peft`.
        patched = isinstance(self, FusedLinear)
        if not patched or args or kwargs or left_reason(self) is not None or not _fits(self, x):
            return Linear.forward(self, x, *args, **kwargs)
        name = _active(self)[0]
        base = self.base_layer
        lora_A, lora_B = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
        dropout, scaling = self.lora_dropout[name], self.scaling[name]
        return lora_linear(
            x,
            base.weight,
            lora_A.weight,
            lora_B.weight,
            _sum_of_biases(base, lora_B.bias, scaling),
            scaling=scaling,
            dropout_p=getattr(dropout, "p", 0.0),
            training=dropout.training,
            impl=self._lora_kernels_impl,
        )


def left_reason(layer: Linear) -> str | None:
    """Return why a layer keeps PEFT's forward in its present state; None where it is fused."""
    if layer.disable_adapters:
        return "adapters disabled"
    if layer.merged_adapters:
        return f"merged: {', '.join(layer.merged_adapters)}"
    active = _active(layer)
    if len(active) != 1:
        return f"{len(active)} active adapters, one is fused" if active else "no active adapter"
    name = active[0]
    if name in layer.lora_variant or layer.use_dora.get(name):
        variant = layer.lora_variant.get(name)
        return f"LoRA variant {type(variant).__name__}" if variant is not None else "DoRA"
    return _module_reason(layer, name)


def _module_reason(layer: Linear, name: str) -> str | None:
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
    for role, module in (("base layer", base), ("lora_A", lora_A), ("lora_B", lora_B)):
        if type(module) is not nn.Linear:
            return f"{role} is {type(module).__name__}, not torch.nn.Linear"
        if type(module.weight) not in _PLAIN_TENSORS:
            return f"{role} weight is a {type(module.weight).__name__}"
    if base.weight.dtype not in FLOAT_DTYPES:
        return f"base weight is {base.weight.dtype}"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"dropout is {type(dropout).__name__}"
    if getattr(dropout, "p", 0.0) == 1.0:
        return "dropout of everything"
    for role, module in (
        ("base layer", base),
        ("lora_A", lora_A),
        ("lora_B", lora_B),
        ("dropout", dropout),
    ):
        if _has_hooks(module):
            return f"hooks on {role}"
    return None


def _fits(layer: Linear, x: Tensor) -> bool:
    """Whether x is what the fused path takes; what is not is PEFT's to compute or to refuse."""
    if type(x) not in _PLAIN_TENSORS or x.dtype not in FLOAT_DTYPES or x.is_meta:
        return False
    return x.dtype == layer.base_layer.weight.dtype or torch.is_autocast_enabled(x.device.type)


def _active(layer: Linear) -> list[str]:
    active = layer._active_adapter
    names = [active] if isinstance(active, str) else active
    return [name for name in names if name in layer.lora_A]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)  # how accelerate hooks a module
    )


def _sum_of_biases(
    base: nn.Linear, adapter: Tensor | None, scaling: float | Tensor
) -> Tensor | None:
    """Return bias + scaling · lora_B.bias, whose gradients autograd splits again."""
    if adapter is None:
        return base.bias
    scaled = adapter * scaling
    total = scaled if base.bias is None else base.bias + scaled
    return total.to(base.weight.dtype)

"""PEFT's LoRA linear layer with a fused forward; imported only when a model is patched.

A patched layer keeps its `__dict__` and changes its class to `FusedLinear`, which is importable by
name: so deep copies, pickles, hooks, isinstance checks and every other method of PEFT's go on
working, and a call that the fused path does not cover is `super().forward`, PEFT's own.
"""

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lora_kernels.checks import FLOAT_DTYPES, is_dtensor, misfit, plainly_fit
from lora_kernels.functional import autocast_dtype, checked_lora_linear
from lora_kernels.packing import Packed, current, forget, restore
from lora_kernels.transforms import needs_plain_torch
from lora_kernels.usage import Calls

# Where torch.export traces, parameters and inputs are fake.
_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
_PLAIN_PARAMETERS = (nn.Parameter, FakeTensor)


class FusedLinear(Linear):
    """PEFT's `lora.Linear`, computed by `lora_linear` unless there is a reason not to."""

    _lora_kernels_impl: str
    _lora_kernels_calls: Calls
    _lora_kernels_packed: Packed | None = None  # set by `prepack_`

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted layer's output; arguments as PEFT's forward."""
        # A wrapper may hold this bound method beyond `unpatch_peft`, a thread may be in it.
        impl: str | None = getattr(self, "_lora_kernels_impl", None)
        if impl is None:
            return Linear.forward(self, x, *args, **kwargs)
        parts = fused_parts(self)
        cast = autocast_dtype(x)
        if isinstance(parts, str):
            reason: str | None = parts
        elif args or kwargs:
            reason = "called with more than x"
        else:
            reason = _call_reason(x, parts, cast)
        # A counter would be one of the things that a compiled graph depends on.
        calls = (
            None if torch.compiler.is_dynamo_compiling() else vars(self).get("_lora_kernels_calls")
        )
        if reason is not None or isinstance(parts, str):
            if calls is not None and reason is not None:
                calls.leave(reason)
            return Linear.forward(self, x, *args, **kwargs)
        if calls is not None:
            calls.fused += 1
        dropout = parts.dropout
        p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        return checked_lora_linear(
            x,
            parts.weight,
            parts.lora_A,
            parts.lora_B,
            parts.bias,
            parts.scaling,
            p,
            None,
            impl,
            cast,
            current(self, parts.weight),
            "" if calls is None else calls.path,
        )

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge as PEFT does; packed copies of the weight come back when it is unmerged."""
        forget(self, "merged, they come back with unmerge()", until_unmerged=True)
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        """Unmerge as PEFT does."""
        super().unmerge()
        if not self.merged_adapters:
            restore(self)


class FusedLoraModel(LoraModel):
    """PEFT's tuner of a patched model: it fuses the layers of adapters added later, too."""

    _lora_kernels_impl: str

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as PEFT does, then fuse its new layers."""
        super().inject_adapter(*args, **kwargs)
        impl: str | None = vars(self).get("_lora_kernels_impl")
        if impl is None:
            return
        layers = dict(self.named_modules())
        told: set[str] = set()
        told = next((m._lora_kernels_calls.told for m in layers.values() if is_fused(m)), told)
        for path, layer in layers.items():
            if type(layer) is Linear and "forward" not in vars(layer):
                become(layer, FusedLinear, impl, path, told)


def is_fused(module: Any) -> bool:
    """Whether a module is a patched layer."""
    return type(module) is FusedLinear


def become(
    module: Any, kind: type, impl: str | None, path: str = "", told: set[str] | None = None
) -> None:
    """Give a layer or tuner another class, and what a patched one has; no `impl`: take it away."""
    module.__class__ = kind
    own = vars(module)
    if impl is None:
        for name in ("impl", "packed", "calls"):
            own.pop(f"_lora_kernels_{name}", None)
        return
    own["_lora_kernels_impl"] = impl
    if kind is FusedLinear:
        own.setdefault("_lora_kernels_calls", Calls(path, told))


class FusedParts(NamedTuple):
    """What a fused call reads from a layer; `bias` holds the adapter's, scaled, as well."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
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
    for role, module in (("base layer", base), ("lora_A", lora_A), ("lora_B", lora_B)):
        reason = _linear_reason(module)
        if reason is not None:
            return f"{role} {reason}"
    reason = _dropout_reason(dropout)
    if reason is not None:
        return f"dropout {reason}"
    scaling = layer.scaling[name]
    if type(scaling) is not float or scaling - scaling != 0.0:
        reason = _scaling_reason(scaling)
        if reason is not None:
            return reason
    own, b = base._parameters, lora_B._parameters
    weight, bias, lora_bias = own["weight"], own["bias"], b["bias"]
    if lora_bias is not None:
        # y = x Wᵀ + (bias + scaling · lora_bias) + ...: autograd splits the gradient again.
        scaled = lora_bias * scaling
        bias = (scaled if bias is None else bias + scaled).to(weight.dtype)
    return FusedParts(weight, bias, lora_A._parameters["weight"], b["weight"], dropout, scaling)


def left_reason(layer: Linear) -> str | None:
    """Return why a layer keeps PEFT's forward in its present state; None where it is fused."""
    parts = fused_parts(layer)
    return parts if isinstance(parts, str) else None


def _linear_reason(module: nn.Module) -> str | None:
    if type(module) is not nn.Linear:
        return f"is {type(module).__name__}, not torch.nn.Linear"
    weight: Any = module._parameters.get("weight")
    if type(weight) not in _PLAIN_PARAMETERS and not is_dtensor(weight):
        return f"weight is a {type(weight).__name__}"
    if weight.dtype not in FLOAT_DTYPES:
        return f"weight is {weight.dtype}"
    return _hook_reason(module)


def _dropout_reason(module: nn.Module) -> str | None:
    if type(module) is nn.Dropout:
        if module.p == 1.0:
            return "drops everything"
    elif type(module) is not nn.Identity:
        return f"is {type(module).__name__}"
    return _hook_reason(module)


def _hook_reason(module: nn.Module) -> str | None:
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # how accelerate hooks a module
    ):
        return "has hooks"
    return None


def _scaling_reason(scaling: Any) -> str | None:
    """Return why a scaling that isn't a finite float keeps PEFT's forward, which broadcasts it."""
    if isinstance(scaling, Tensor):
        if scaling.requires_grad:
            return "scaling requires grad"
        if scaling.ndim != 0 or not scaling.is_floating_point():
            return f"scaling is a {scaling.dtype} tensor of shape {list(scaling.shape)}"
    elif not isinstance(scaling, Real):
        return f"scaling is a {type(scaling).__name__}"
    elif not math.isfinite(scaling):
        return f"scaling is {scaling}"
    return None


def _call_reason(x: Any, parts: FusedParts, cast: torch.dtype | None) -> str | None:
    """Return why a call with x is PEFT's to compute, or to refuse; None where it is fused."""
    if needs_plain_torch():
        return (
            "inside a torch.func transform, forward-mode differentiation, a trace or a FLOP count"
        )
    weight, bias, lora_A, lora_B, _, scaling = parts
    if isinstance(scaling, Tensor) and scaling.device != x.device:
        return f"scaling is on {scaling.device}"
    if plainly_fit(x, weight, lora_A, lora_B, bias, cast):
        return None
    if not isinstance(x, Tensor):
        return f"x is a {type(x).__name__}"
    if not (type(x) in _PLAIN_TENSORS or is_dtensor(x) or _is_awaited(x)):
        return f"x is a {type(x).__name__}"
    if x.is_meta:
        return "x is a meta tensor"
    misfitting = misfit(x, weight, lora_A, lora_B, bias, cast)
    return None if misfitting is None else str(misfitting)


def _is_awaited(x: Tensor) -> bool:
    """Whether x is a collective's result, which its first operator waits for."""
    return type(x).__name__ == "AsyncCollectiveTensor"

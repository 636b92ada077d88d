"""PEFT's LoRA of experts' parameters with a fused forward; imported only when a model is patched.

PEFT wraps a module of experts once for each parameter that it adapts, the wrappers around one
another, and computes with W + Δ of all experts. A fused call of the outermost is that of the module
itself, with the adapters of all its wrappers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from lora_kernels._peft.fused import Fused
from lora_kernels._peft.summed import MOST_RANKS, joined
from lora_kernels.bypass import (
    everywhere_reason,
    hooks_reason,
    inference_reason,
    origin,
    scaling_reason,
)
from lora_kernels.bypass import read_linear as read_factor
from lora_kernels.checks import check_memory
from lora_kernels.experts import (
    ExpertsLinear,
    Linears,
    call_reason,
    experts_forward,
    factors,
    module_reason,
    names_of,
    read_linear,
)
from lora_kernels.operands.call import Adapter

_PEFT = "peft.tuners.lora.layer"

# The experts' module and its two layers.
Parts = tuple[Any, Linears]


class FusedExperts(Fused, ParamWrapper):
    """PEFT's `lora.ParamWrapper` around experts, computed by `grouped_lora_linear` if it can be."""

    _lora_kernels_theirs = ParamWrapper
    _lora_kernels_op = "grouped_lora_linear"

    def _lora_kernels_left(self) -> str | None:
        parts = fused_parts(self)
        return parts if isinstance(parts, str) else None

    def _call_of(
        self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any], impl: str
    ) -> Callable[[], Tensor] | str:
        """Return what computes a call of a module of experts, or why it is PEFT's to compute."""
        names = ("top_k_index", "top_k_weights")
        routed = (*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))
        if len(routed) != 2 or len(args) + len(kwargs) != 2:
            return "called with other than hidden_states, top_k_index, top_k_weights"
        parts = fused_parts(self)
        if isinstance(parts, str):
            return parts
        reason = call_reason(x, *routed, *parts, impl)
        if reason is not None:
            return reason
        return partial(experts_forward, x, *routed, *parts, impl)


# PEFT looks for the wrappers of an earlier adapter by this name; pickles go by __qualname__.
FusedExperts.__name__ = ParamWrapper.__name__


def fused_parts(layer: Any) -> Parts | str:
    """Return the experts' module and its two linear layers, or why PEFT's forward is kept."""
    if origin(ParamWrapper.forward) != _PEFT:
        return "peft's forward was replaced"
    adapters: dict[str, tuple[Any, Adapter]] = {}
    module = layer
    while isinstance(module, ParamWrapper):
        reason = None if module is layer else hooks_reason(module)
        adapter = _adapter(module) if reason is None else f"its base_layer {reason}"
        if isinstance(adapter, str):
            return adapter
        adapters[module.parameter_name] = module, adapter
        module = module._modules["base_layer"]
    reason = module_reason(module) or everywhere_reason()
    if reason is not None:
        return f"base layer {reason}"
    names = names_of(module)
    if not adapters.keys() <= set(names):
        return f"adapts {', '.join(adapters)}, not {' or '.join(names)}"
    first, second = (_linear(module, name, adapters.get(name)) for name in names)
    if isinstance(first, str):
        return first
    return second if isinstance(second, str) else (module, (first, second))


def _adapter(wrapper: Any) -> Adapter | str:
    """Return A [E, R, K], B [E, N, R] and scaling of a wrapper's active adapters, or why not."""
    if wrapper._disable_adapters:
        return "adapters disabled"
    if wrapper.merged_adapters:
        return f"merged: {', '.join(wrapper.merged_adapters)}"
    known = wrapper._modules["lora_A"]._modules
    names = [name for name in wrapper.active_adapters if name in known]
    if not names:
        return "no active adapter"
    if wrapper.num_experts == 1:
        return f"{wrapper.parameter_name} has no experts, or one"
    found = []
    for name in names:
        adapter = _factors(wrapper, name)
        if isinstance(adapter, str):
            return adapter
        found.append(adapter)
    return found[0] if len(found) == 1 else _summed(found)


def _factors(wrapper: Any, name: str) -> Adapter | str:
    """Return one adapter of all experts."""
    modules, experts = wrapper._modules, wrapper.num_experts
    a, b = (read_factor(modules[factor]._modules[name]) for factor in ("lora_A", "lora_B"))
    if isinstance(a, str):
        return f"lora_A {a}"
    if isinstance(b, str):
        return f"lora_B {b}"
    reason = scaling_reason(wrapper.scaling[name])
    if reason is not None:
        return reason
    own = factors(a[0], b[0], experts)
    if own is None or b[1] is not None:
        sizes = f"lora_A {list(a[0].shape)} and lora_B {list(b[0].shape)}"
        return f"{sizes} aren't of {experts} experts"
    return Adapter(*own, wrapper.scaling[name])


def _summed(adapters: list[Adapter]) -> Adapter | str:
    """Return one adapter of all ranks, whose product is the sum of theirs, or why not."""
    if sum(a.shape[1] for a, _, _ in adapters) > MOST_RANKS:
        return f"their ranks are more than {MOST_RANKS} together"
    kinds = {(a.shape[2], b.shape[1], a.dtype, b.dtype, a.device) for a, b, _ in adapters}
    if len(kinds) > 1:
        return "their sizes, dtypes or devices differ"
    for a, b, _ in adapters:
        check_memory(lora_A=a, lora_B=b)
        # What is joined is no inference tensor any more, and PEFT's own product refuses one.
        if (reason := inference_reason(a, b)) is not None:
            return reason
    wide = [b.float() if b.dtype.itemsize == 2 else b for _, b, _ in adapters]
    scaled = [b * scaling for b, (_, _, scaling) in zip(wide, adapters, strict=True)]
    return Adapter(joined([a for a, _, _ in adapters], 1), joined(scaled, 2), 1.0)


def _linear(module: Any, name: str, adapted: tuple[Any, Adapter] | None) -> ExpertsLinear | str:
    """Return a linear layer of the experts, or why it can't be fused."""
    wrapper, adapter = adapted or (None, None)
    linear = read_linear(module, name, adapter)
    if wrapper is None or isinstance(linear, str):
        return linear
    # Before 0.19.1 PEFT took the dimensions of W by their order, and A acted on the outputs.
    if getattr(wrapper, "_did_swap_in_out_features", None) is not (not module.is_transposed):
        return f"lora_A of {name} acts on its outputs, as PEFT before 0.19.1 had it"
    return linear

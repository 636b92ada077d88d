"""PEFT's LoRA linear layer with a fused forward; imported only when a model is patched.

A patched layer keeps its `__dict__` and changes its class to `FusedLinear`, which is importable by
name: so deep copies, pickles, hooks, isinstance checks and every other method of PEFT's go on
working, and a call that the fused path does not cover is `super().forward`, PEFT's own.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_dynamo_compiling

from lora_kernels._peft import dora, mixed
from lora_kernels._peft.read_variant import read_variant, times_diagonal
from lora_kernels._peft.summed import summed_parts
from lora_kernels.bypass import (
    INFERENCE,
    PLAIN_TENSORS,
    dropout_reason,
    everywhere_reason,
    origin,
    read_linear,
    refuses_strides,
    scaling_reason,
)
from lora_kernels.checks import check_memory, is_dtensor, misfit, plainly_fit
from lora_kernels.copies import Copies, current, forget, restore
from lora_kernels.dispatch import few_rows_slower_than_peft, has_op, slower_than_peft
from lora_kernels.norms import known_norm
from lora_kernels.operands.call import Adapter, LinearCall, autocast_dtype
from lora_kernels.operands.dora import DoraCall
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.request import Request
from lora_kernels.ops.dora import run as run_dora
from lora_kernels.ops.dora import run_with_norm
from lora_kernels.ops.linear import run
from lora_kernels.quantized import is_quantized
from lora_kernels.usage import Calls

_PEFT = "peft.tuners.lora.layer"  # whose Linear.forward a fused call stands for
_FORWARD = Linear.forward if origin(Linear.forward) == _PEFT else None
# All that a patched layer or tuner has in its `__dict__` beside PEFT's own.
OWN_ATTRIBUTES = tuple(
    f"_lora_kernels_{name}" for name in ("impl", "options", "calls", "packed", "norms")
)


class FusedLinear(Linear):
    """PEFT's `lora.Linear`, computed by `lora_linear` unless there is a reason not to."""

    _lora_kernels_theirs = Linear
    _lora_kernels_op = "lora_linear"
    _lora_kernels_impl: str
    _lora_kernels_calls: Calls
    _lora_kernels_packed: Copies | None = None  # set by `prepack_` and `cast_weights_`

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted layer's output; arguments as PEFT's forward."""
        # A wrapper may hold this bound method beyond `unpatch_peft`, a thread may be in it.
        own = self.__dict__
        impl: str | None = own.get("_lora_kernels_impl")
        if impl is None:
            return Linear.forward(self, x, *args, **kwargs)
        # A counter would be one of the things that a compiled graph depends on.
        calls = None if is_dynamo_compiling() else own.get("_lora_kernels_calls")
        if kwargs or "_lora_kernels_batch" in own:
            return self._mixed(x, args, kwargs, impl, calls)
        parts = fused_parts(self)
        if isinstance(parts, str) or args:
            if calls is not None:
                calls.leave(parts if isinstance(parts, str) else "called with more than x")
            return Linear.forward(self, x, *args, **kwargs)
        weight, bias, lora_A, lora_B, dropout, scaling, magnitude = parts
        # In this order: a compiled graph without dropout then doesn't depend on the mode.
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        if magnitude is not None and p and not self.training:  # DoRA's asks the layer's mode, too
            p = 0.0
        cast = autocast_dtype(x)
        call = LinearCall(current(self, weight), Adapter(lora_A, lora_B, scaling), bias, None)
        reason = call_reason(x, call, p, cast, impl, self._modules["base_layer"])
        if reason is None and magnitude is not None:
            reason = dora.call_reason(x, DoraCall(call, magnitude), p, impl)
        elif reason is None and impl == "auto" and not x.is_cpu:
            reason = few_rows_slower_than_peft(x, cast or x.dtype, lora_A.dtype)
        if reason is not None:
            if calls is not None:
                calls.leave(reason)
            return Linear.forward(self, x)
        if calls is not None:
            calls.fused += 1
            calls.autocast = cast or calls.autocast
        if p:
            call = call._replace(dropout=drawn(p, None, x.device))
        path = "" if calls is None else calls.path
        if magnitude is not None:
            asked = DoraCall(call, magnitude)
            norm = known_norm(self, weight, asked, impl, cast or x.dtype)
            if norm is not None:
                return run_with_norm(x, asked, norm, impl, cast)
            return run_dora(x, asked, impl, cast, path)
        return run(x, call, impl, cast, path)

    def _mixed(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], impl: str, calls: Any
    ) -> Tensor:
        """Return the output of a batch whose samples name their adapters."""
        batch: Any = vars(self).get("_lora_kernels_batch")
        if batch is not None:
            path = "" if calls is None else calls.path
            more = [name for name in kwargs if name != "alora_offsets"]  # a plain LoRA reads none
            if args or more:
                got = ", ".join(more) or "another argument"
                raise ValueError(f"layer {path!r}: expected x alone in adapter_batch, got {got}")
            given: Tensor = batch.forward(self, x, impl, path)
            return given
        if not kwargs:  # a model that was copied inside a block
            vars(self).pop("_lora_kernels_batch", None)
            return self.forward(x, *args)
        y: Tensor | str = "called with more than x"
        names = kwargs.get("adapter_names")
        if names is not None and len(kwargs) == 1 and not args:
            self._check_forward_args(x, adapter_names=names)
            samples = mixed.Samples(names)
            few = mixed.few_rows_reason(x, samples, impl)
            y = few or mixed.forward(self, x, samples, impl)
        if calls is not None and isinstance(y, str):
            calls.leave(y)
        elif calls is not None:
            calls.fused += 1
        return Linear.forward(self, x, *args, **kwargs) if isinstance(y, str) else y

    def _lora_kernels_left(self) -> str | None:
        parts = fused_parts(self)
        return parts if isinstance(parts, str) else None

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge as PEFT does; packed copies of the weight come back when it is unmerged."""
        forget(self, "merged, they come back with unmerge()", until_unmerged=True)
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        """Unmerge as PEFT does."""
        # A merged layer may have been packed; PEFT's write through .data leaves no trace.
        forget(self, "unmerged", until_unmerged=True)
        super().unmerge()
        if not self.merged_adapters:
            read = read_linear(self.base_layer)
            restore(self, f"base layer {read}" if isinstance(read, str) else read[0])

    def olora_init(self, *args: Any, **kwargs: Any) -> None:
        """Initialise an adapter as PEFT does, which takes it out of the weight through `.data`."""
        forget(self, "changed by OLoRA; call prepack_ or cast_weights_ again")
        super().olora_init(*args, **kwargs)


class FusedLoraModel(LoraModel):
    """PEFT's tuner of a patched model: it fuses the layers of adapters added later, too."""

    _lora_kernels_impl: str
    _lora_kernels_options: tuple[str, ...]

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as PEFT does, then fuse its new layers."""
        super().inject_adapter(*args, **kwargs)
        impl: str | None = vars(self).get("_lora_kernels_impl")
        if impl is None:
            return
        layers = dict(self.named_modules())
        told: set[str] = set()
        asked = Patched(impl, vars(self).get("_lora_kernels_options", ()))
        told = next((m._lora_kernels_calls.told for m in layers.values() if is_fused(m)), told)
        for path, layer in layers.items():
            kind = None if is_fused(layer) or "forward" in vars(layer) else fused_kind(layer)
            if kind is not None and has_op(impl, kind._lora_kernels_op):
                become(layer, kind, asked, path, told)


class Patched(NamedTuple):
    """What `patch_peft` was asked for: `impl`, and for which formats W in x's dtype."""

    impl: str
    options: tuple[str, ...] = ()


# By the module of PEFT's class, ours with its `FUSED`; some need a library of their own.
_MODULES = {
    "peft.tuners.lora.layer": "lora_kernels._peft.other",
    "peft.tuners.lora.bnb": "lora_kernels._peft.bnb",
    "peft.tuners.lora.torchao": "lora_kernels._peft.torchao",
}


def fused_kind(layer: Any) -> Any:
    """Return the class that a layer has when it is patched, or None."""
    kind = type(layer)
    if is_fused(layer):
        return kind
    if kind is Linear and not is_quantized(layer.get_base_layer()):
        return FusedLinear
    of_linear = "lora_kernels._peft.quantized"
    module = of_linear if kind is Linear else _MODULES.get(kind.__module__)
    found: Any = None if module is None else import_module(module).FUSED.get(kind)
    return found


def is_fused(module: Any) -> bool:
    """Whether a module is a patched layer."""
    return "_lora_kernels_theirs" in vars(type(module))


def become(
    module: Any, kind: type, asked: Patched | None, path: str = "", told: set[str] | None = None
) -> None:
    """Give a layer or tuner another class, and what a patched one has; None: take it away."""
    module.__class__ = kind
    own = vars(module)
    if asked is None:
        for name in OWN_ATTRIBUTES:
            own.pop(name, None)
        return
    own["_lora_kernels_impl"] = asked.impl
    own.pop("_lora_kernels_options", None)
    if asked.options:
        own["_lora_kernels_options"] = asked.options
    if is_fused(module):
        own.setdefault("_lora_kernels_calls", Calls(path, told))


# What a fused call reads from a layer: weight, bias (the adapter's, scaled, is part of it), lora_A,
# lora_B, dropout's module, scaling, DoRA's magnitude. A NamedTuple would take half a microsecond
# more.
FusedParts = tuple[Any, Tensor | None, Tensor, Tensor, nn.Module, float | Tensor, Tensor | None]


def fused_parts(layer: Any, read: Callable[[Any], Any] = read_linear) -> FusedParts | str:
    """Return what a fused call needs, or why the layer keeps PEFT's forward in its present state.

    Runs at every call, so it reads `_modules` and `_parameters` themselves: an attribute of an
    nn.Module costs up to 1 µs, and through attributes this took 25 µs.
    """
    # Before W is read: inside transforms codes have no memory, and traces no name for them.
    reason = _state_reason(layer) or everywhere_reason()
    if reason is not None:
        return reason
    modules: dict[str, Any] = layer._modules
    adapters, active = modules["lora_A"]._modules, layer._active_adapter
    names = [active] if isinstance(active, str) else active
    if len(names) != 1 or names[0] not in adapters:
        names = [name for name in names if name in adapters]
        if len(names) != 1:
            return summed_parts(layer, names, read) if names else "no active adapter"
    name = names[0]
    magnitude: Any = None
    diagonal: Any = None
    if name in layer.lora_variant or layer.use_dora.get(name):
        variant = read_variant(layer, name)
        if isinstance(variant, str):
            return variant
        magnitude, diagonal = variant
    base, dropout = modules["base_layer"], modules["lora_dropout"]._modules[name]
    lora_A, lora_B = adapters[name], modules["lora_B"]._modules[name]
    own, a, b = read(base), read_linear(lora_A), read_linear(lora_B)
    if isinstance(own, str):
        return f"base layer {own}"
    if isinstance(a, str):
        return f"lora_A {a}"
    if isinstance(b, str):
        return f"lora_B {b}"
    if a[1] is not None:
        return "lora_A has a bias"
    reason = dropout_reason(dropout)
    if reason is not None:
        return reason
    scaling = layer.scaling[name]
    if type(scaling) is not float or scaling - scaling != 0.0:
        reason = scaling_reason(scaling)
        if reason is not None:
            return reason
    weight, bias = own
    quantised = not isinstance(weight, Tensor)
    if magnitude is not None and (quantised or b[1] is not None):
        return f"DoRA beside {'a quantised weight' if quantised else 'a bias of lora_B'}"
    factor = b[0] if diagonal is None else times_diagonal(b[0], diagonal)
    if isinstance(factor, str):
        return factor
    if b[1] is not None:
        both = _with_lora_bias(own, b[0], b[1], scaling)
        if isinstance(both, str):
            return both
        bias = both
    return weight, bias, a[0], factor, dropout, scaling, magnitude


def _state_reason(layer: Any) -> str | None:
    if Linear.forward is not _FORWARD and origin(Linear.forward) != _PEFT:
        return "peft's Linear.forward was replaced"
    if layer._disable_adapters:
        return "adapters disabled"
    return f"merged: {', '.join(layer.merged_adapters)}" if layer.merged_adapters else None


def _with_lora_bias(
    base: tuple[Any, Tensor | None], lora_B: Tensor, lora_bias: Tensor, scaling: float | Tensor
) -> Tensor | str:
    """Return the bias of a fused call, or why there is none.

    y = x Wᵀ + (bias + scaling · lora_bias) + ...: autograd splits the gradient again.
    """
    weight, bias = base
    if not isinstance(weight, Tensor):
        return "lora_B has a bias beside a quantised weight"
    if lora_bias.dtype != lora_B.dtype:
        return f"lora_B's bias is {lora_bias.dtype}, its weight {lora_B.dtype}"
    if lora_bias.device != weight.device:
        return f"lora_B's bias is on {lora_bias.device}, the base layer on {weight.device}"
    for name, t in (("lora_B's bias", lora_bias), ("bias", bias)):
        if t is not None and (t.is_nested or t.layout is not torch.strided):
            return f"{name} has layout {t.layout}" if not t.is_nested else f"{name} is nested"
    if bias is not None and (bias.shape != lora_bias.shape or bias.device != lora_bias.device):
        return f"bias has shape {list(bias.shape)} on {bias.device}, unlike lora_B's"
    factor = scaling if isinstance(scaling, Tensor) else None
    check_memory(bias=bias, lora_bias=lora_bias, scaling=factor)
    scaled = lora_bias * scaling
    # In the base bias's own dtype: one that doesn't fit is PEFT's to refuse.
    return scaled.to(weight.dtype) if bias is None else (bias + scaled).to(bias.dtype)


def left_reason(layer: Any) -> str | None:
    """Return why a layer keeps PEFT's forward in its present state; None where it is fused."""
    reason: str | None = layer._lora_kernels_left()
    return reason


def call_reason(
    x: Any, call: LinearCall, p: float, cast: torch.dtype | None, impl: str, base: Any
) -> str | None:
    """Return why a call with x is PEFT's to compute, or to refuse; None where it is fused."""
    lora_A, lora_B, scaling = call.adapter
    if type(scaling) is not float or not plainly_fit(x, call, cast):
        reason = misfit_reason(x, call, cast)
        if reason is not None:
            return reason
    # dynamo asks the same by itself.
    if not is_dynamo_compiling():
        if is_grad_enabled() and (
            x.is_inference()
            or call.weight.stored.is_inference()
            or lora_A.is_inference()
            or lora_B.is_inference()
        ):
            return INFERENCE
        if not x.is_contiguous() and refuses_strides(base, x):
            return "x is no matrix as it lies, which its base layer asks for"
    if x.is_cpu or impl != "auto":
        return None
    dtype, rank = cast or x.dtype, lora_A.shape[0]
    asked = Request("lora_linear", x.device, dtype, rank, p > 0.0, call.weight.format)
    return slower_than_peft(asked)


def misfit_reason(x: Any, call: LinearCall, cast: torch.dtype | None) -> str | None:
    """Return what keeps a call from being fused that doesn't fit as most do, or None."""
    lora_A, lora_B, scaling = call.adapter
    if not isinstance(x, Tensor):
        return f"x is a {type(x).__name__}"
    if isinstance(scaling, Tensor) and scaling.device != x.device:
        return f"scaling is on {scaling.device}"
    if not (type(x) in PLAIN_TENSORS or is_dtensor(x) or _is_awaited(x)):
        return f"x is a {type(x).__name__}"
    if x.is_meta:
        return "x is a meta tensor"
    reason = mixed.dtype_reason(lora_A.dtype, lora_B.dtype, cast)
    if reason is not None:
        return reason
    misfitting = misfit(x, call, cast)
    return None if misfitting is None else str(misfitting)


def _is_awaited(x: Tensor) -> bool:
    """Whether x is a collective's result, which its first operator waits for."""
    return type(x).__name__ == "AsyncCollectiveTensor"

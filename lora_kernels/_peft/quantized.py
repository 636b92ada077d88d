"""PEFT's LoRA layers over quantised weights with a fused forward, whichever library's they are.

Classes over a library's own layers lie in a module each, which needs that library: `bnb.py`,
`torchao.py`. Here is what they share, and the class for PEFT's plain layer over a quantised one.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from lora_kernels._peft.linear import FusedParts, call_reason, fused_parts
from lora_kernels.bypass import origin
from lora_kernels.operands.call import Adapter
from lora_kernels.operands.dropout import drawn
from lora_kernels.ops.linear import run
from lora_kernels.quantized import Base, apply, as_computed, read_quantized, settled, unconverted
from lora_kernels.usage import Calls


class QuantizedForward:
    """The forward of a patched layer over a quantised weight; each class of PEFT's gets its own."""

    _lora_kernels_theirs: type[Any]
    _lora_kernels_op = "lora_linear"
    _lora_kernels_impl: str
    _lora_kernels_calls: Calls
    _lora_kernels_options: tuple[str, ...]
    _lora_kernels_packed = None  # there are no copies to make

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted layer's output; arguments as PEFT's forward."""
        own = self.__dict__
        impl: str | None = own.get("_lora_kernels_impl")
        if impl is None:
            return self._lora_kernels_theirs.forward(self, x, *args, **kwargs)
        calls = None if torch.compiler.is_dynamo_compiling() else own.get("_lora_kernels_calls")
        parts = parts_of(self)
        if args or kwargs:
            parts = parts if isinstance(parts, str) else "called with more than x"
        elif not isinstance(x, Tensor):
            parts = f"x is a {type(x).__name__}"
        y = parts if isinstance(parts, str) else _fused(self, x, parts, impl, calls)
        if isinstance(y, Tensor):
            return y
        if calls is not None:
            calls.leave(y)
        if args or kwargs or not isinstance(x, Tensor):
            return _by_peft(self, x, *args, **kwargs)
        return _unfused(self, x, impl)

    def _lora_kernels_left(self) -> str | None:
        parts = parts_of(self)
        return parts if isinstance(parts, str) else None


class FusedQuantizedLinear(QuantizedForward, Linear):
    """PEFT's `lora.Linear` over a layer that keeps its weight quantised, such as FP8Linear."""

    _lora_kernels_theirs = Linear


FUSED = {Linear: FusedQuantizedLinear}


def parts_of(layer: Any) -> FusedParts | str:
    """Return what a fused call needs, a `Base` in the weight's place, or why the layer is left."""
    if not origin(layer._lora_kernels_theirs.forward).startswith("peft.tuners.lora."):
        return "peft's forward was replaced"
    return fused_parts(layer, lambda base: _readable(layer, base))


def _readable(layer: Any, base: Any) -> tuple[Base, None] | str:
    read = read_quantized(base)
    if read is None:
        return f"is {type(base).__name__}, which keeps no quantised weight"
    if isinstance(read, str):
        return read
    option = read.option
    if option is not None and option not in layer.__dict__.get("_lora_kernels_options", ()):
        return f'quantises activations too; {option}="weights" of patch_peft leaves them in 16 bits'
    return read, None


def _fused(
    layer: Any, x: Tensor, parts: FusedParts, impl: str, calls: Calls | None
) -> Tensor | str:
    """Return y by one call, or why it is PEFT's to compute."""
    read, _, lora_A, lora_B, dropout, scaling, _ = parts
    module = layer._modules["base_layer"]
    base = settled(module, read, x)
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    given, call, cast = as_computed(x, base, Adapter(lora_A, lora_B, scaling), None)
    reason = call_reason(given, call, p, cast, impl, module)
    if reason is not None:
        return reason
    if calls is not None:
        calls.fused += 1
    if p:
        call = call._replace(dropout=drawn(p, None, x.device))
    y = run(given, call, impl, cast, "" if calls is None else calls.path)
    return y.to(x.dtype) if base.casts_back else y


def _unfused(layer: Any, x: Tensor, impl: str) -> Tensor:
    """Return y of a layer in a state that isn't fused; without adapters by our base product."""
    if layer._disable_adapters or layer.merged_adapters:
        if layer._disable_adapters and layer.merged_adapters:
            layer.unmerge()  # as PEFT's forward does
        module = layer._modules["base_layer"]
        read = _readable(layer, module)
        if not isinstance(read, str):
            return apply(x, settled(module, read[0], x), None, None, impl)
    return _by_peft(layer, x)


def _by_peft(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with unconverted(layer._modules["base_layer"]):
        return layer._lora_kernels_theirs.forward(layer, x, *args, **kwargs)

"""PEFT's LoRA layers over quantised weights with a fused forward, whichever library's they are.

Classes over a library's own layers lie in a module each, which needs that library: `bnb.py`,
`torchao.py`. Here is what they share, and the class for PEFT's plain layer over a quantised one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from lora_kernels._peft.fused import Fused, path_of
from lora_kernels._peft.linear import FusedParts, call_reason, fused_parts, misfit_reason
from lora_kernels.bypass import origin
from lora_kernels.operands.call import Adapter
from lora_kernels.operands.dropout import drawn
from lora_kernels.ops.linear import run
from lora_kernels.quantized import Base, as_computed, read_quantized, settled, unconverted
from lora_kernels.transforms import needs_plain_torch


class QuantizedForward(Fused):
    """The forward of a patched layer over a quantised weight; each class of PEFT's gets its own."""

    _lora_kernels_op = "lora_linear"
    _lora_kernels_options: tuple[str, ...]

    def _lora_kernels_left(self) -> str | None:
        parts = parts_of(self)
        return parts if isinstance(parts, str) else None

    def _fused_call(self, x: Any, impl: str) -> Callable[[], Tensor] | str:
        layer: Any = self
        parts = parts_of(layer)
        if isinstance(parts, str):
            return parts
        if not _is_number(x):
            return f"x is {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        read, _, lora_A, lora_B, dropout, scaling, _ = parts
        module = layer._modules["base_layer"]
        base = settled(module, read, x)
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        given, call, cast = as_computed(x, base, Adapter(lora_A, lora_B, scaling), None)
        reason = call_reason(given, call, p, cast, impl, module)
        if reason is not None:
            return reason
        if p:
            call = call._replace(dropout=drawn(p, None, x.device))
        compute = partial(run, given, call, impl, cast, path_of(layer))
        return (lambda: compute().to(x.dtype)) if base.casts_back else compute

    def _unfused(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return PEFT's output; without adapters, which it forms by the base layer, our product."""
        layer: Any = self
        alone = layer._disable_adapters or layer.merged_adapters
        if alone and _is_number(x) and not (args or kwargs or needs_plain_torch()):
            if layer._disable_adapters and layer.merged_adapters:
                layer.unmerge()  # as PEFT's forward does
            module = layer._modules["base_layer"]
            read = _readable(layer, module)
            if not isinstance(read, str):
                base = settled(module, read[0], x)
                given, call, cast = as_computed(x, base, None, None)
                if misfit_reason(given, call, cast) is None:
                    y = run(given, call, layer.__dict__.get("_lora_kernels_impl", "auto"), cast)
                    return y.to(x.dtype) if base.casts_back else y
        with unconverted(layer._modules["base_layer"]):
            return super()._unfused(x, *args, **kwargs)


class FusedQuantizedLinear(QuantizedForward, Linear):
    """PEFT's `lora.Linear` over a layer that keeps its weight quantised, such as FP8Linear."""

    _lora_kernels_theirs = Linear


FUSED = {Linear: FusedQuantizedLinear}


def _is_number(x: Any) -> bool:
    # Cast to the dtype that a layer computes in, others would lose what PEFT's forward keeps.
    return isinstance(x, Tensor) and x.is_floating_point()


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

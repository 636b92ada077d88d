"""Frozen weights that bitsandbytes quantised: its layers, and what they decode to.

Imported by nobody but who measures such a case: bitsandbytes is no requirement.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.testing import Inputs

# Bytes of an element of W, scales included: nested ones of 4-bit blocks of 64, a row's of int8.
BYTES = {"nf4": 0.516, "int8": 1.0}


@dataclass
class Coded(Inputs):
    """The tensors of a call whose W is what a layer of bitsandbytes decodes to."""

    layer: nn.Module


def coded(inputs: Inputs, base: str) -> Coded:
    """Quantise the W of a call's tensors, on its device, by bitsandbytes' defaults."""
    layer = _layer(inputs.weight, base)
    weight = lk.quantized_weight(layer).decode(inputs.x.dtype)
    values: dict[str, Any] = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return Coded(**{**values, "weight": weight}, layer=layer)


def _layer(weight: Tensor, base: str) -> nn.Module:
    import bitsandbytes as bnb

    n, k = weight.shape
    layer: Any
    if base == "nf4":
        layer = bnb.nn.Linear4bit(k, n, False, weight.dtype, quant_type="nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", module=layer
        )
    else:
        layer = bnb.nn.Linear8bitLt(k, n, False, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    moved: nn.Module = layer.to(weight.device)  # quantises
    return moved


def quantise(model: Any, names: Collection[str], base: str, codes: bool) -> None:
    """Replace a model's linears of these names, without biases, by layers of bitsandbytes.

    codes: False puts linears there of what those decode to, for whom reads no codes.
    """
    for path, linear in list(model.named_modules()):
        if path.rpartition(".")[2] in names:
            layer = _layer(linear.weight.detach(), base)
            if codes:
                model.set_submodule(path, layer)
            else:
                linear.weight.data = lk.quantized_weight(layer).decode(linear.weight.dtype)
    if codes:
        model.is_loaded_in_4bit = base == "nf4"  # PEFT asks for these
        model.is_loaded_in_8bit = base == "int8"


def peft_class(layer: nn.Module) -> Any:
    """Return PEFT's class of LoRA layers over such a layer."""
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

    return Linear4bit if type(layer).__name__ == "Linear4bit" else Linear8bitLt

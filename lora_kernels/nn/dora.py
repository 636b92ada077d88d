"""DoRA's magnitude as a module, beside the adapter that it belongs to."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.bypass import PLAIN_TENSORS, hooks_reason
from lora_kernels.checks import FLOAT_DTYPES
from lora_kernels.impl.reference.dora import row_norms
from lora_kernels.operands.call import Adapter, LinearCall
from lora_kernels.operands.dora import gain_of
from lora_kernels.operands.weight import Dense


class Magnitude(nn.Module):
    """The learned length of each row of W + scaling · B A, [out_features], of a LoRALinear.

    It has PEFT's name there, `lora_magnitude_vector.weight`, and lora_B's dtype.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        b = layer.lora_B.weight
        self.weight = nn.Parameter(b.new_empty(b.shape[0]))
        self.reset(layer)

    @torch.no_grad()
    def reset(self, layer: Any) -> None:
        """Take the lengths that the rows have now."""
        self.weight.copy_(self._norms(layer, layer.base_layer.weight))

    def gain(self, layer: Any, weight: Tensor) -> Tensor:
        """Return the factor on each row of `weight` + scaling · B A; the norm has no gradient."""
        norm = self._norms(layer, weight)
        return gain_of(self.weight.to(norm.device), norm)

    def read(self, weight: Tensor) -> Tensor | str:
        """Return the magnitude for a fused call with W, or what that would bypass."""
        magnitude: Any = self._parameters.get("weight")
        if type(magnitude) not in PLAIN_TENSORS:
            return "lora_magnitude_vector has no plain weight"
        if type(weight) not in PLAIN_TENSORS:
            return f"DoRA beside a {type(weight).__name__}"
        if type(self) is not Magnitude or "forward" in vars(self):
            return "lora_magnitude_vector has a forward of its own"
        reason = hooks_reason(self)
        if reason is not None:
            return f"lora_magnitude_vector {reason}"
        if magnitude.dtype not in FLOAT_DTYPES:
            return f"lora_magnitude_vector is {magnitude.dtype}"
        return magnitude

    def forward(self, layer: Any, y: Tensor, dropped: Tensor) -> Tensor:
        """Return the layer's output from its base layer's, y, by calls of its submodules."""
        base, gain = layer.base_layer, self.gain(layer, layer.base_layer.weight)
        drops = layer.training and layer.lora_dropout
        product = base(dropped.to(y.dtype)) if drops else y
        if base.bias is not None:
            product = product - base.bias
        low = layer.lora_B(layer.lora_A(dropped)) * layer.scaling
        return (y + (gain - 1) * product + gain * low).to(y.dtype)

    def _norms(self, layer: Any, weight: Any) -> Tensor:
        dtype = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        if dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"base_layer.weight: expected floats to form DoRA's norm of, got {dtype}"
            )
        adapter = Adapter(layer.lora_A.weight, layer.lora_B.weight, layer.scaling)
        return row_norms(LinearCall(Dense(weight), adapter, None, None))

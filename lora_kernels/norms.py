"""The norms of DoRA's rows that a layer keeps from one call without gradients to the next.

To form them reads the whole of W, which at few rows of x costs more than the layer's products.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.impl.eager.dora import row_norms
from lora_kernels.operands.call import LinearCall
from lora_kernels.operands.dora import DoraCall
from lora_kernels.operands.held import HeldWeight
from lora_kernels.operands.precision import is_outranged

_PLAIN = (nn.Parameter, Tensor)
_count_dispatch_modes = torch._C._len_torch_dispatch_stack


class KnownNorms(HeldWeight):
    """Norms, and what they were formed of: W as it is held, A and B by their values.

    Fused optimizers and writes through `.data` don't move a version. To compare values reads
    R (N + K) numbers, where to form norms reads N K.
    """

    def __init__(self, weight: Tensor, linear: LinearCall) -> None:
        super().__init__(weight)
        a, b, self._scaling = linear.adapter
        self._a, self._b, self._of = a.detach().clone(), b.detach().clone(), linear.weight.dtype
        self.norm = row_norms(linear)

    def are_of(self, weight: Tensor, linear: LinearCall) -> bool:
        """Whether the norms are those of a call."""
        a, b, scaling = linear.adapter
        return (
            self.holds(weight)
            and linear.weight.dtype == self._of
            and bool(scaling == self._scaling)
            and _same(a, self._a)
            and _same(b, self._b)
        )


def known_norm(
    layer: Any, weight: Tensor, call: DoraCall, impl: str, dtype: torch.dtype
) -> Tensor | None:
    """Return the norms of a call's rows [N] from the layer, formed at need; None where none serve.

    weight: the base layer's. dtype: that of x, or of autocast. They serve calls on CPUs without
    gradients and dropout: on a GPU to compare values would wait for it. Nor do they where float16
    has a float32 branch, whose product g brings into its range.
    """
    linear = call.linear
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or linear.dropout is not None
        or impl not in ("auto", "cpu", "eager")
        or any(type(t) not in _PLAIN for t in (weight, *linear.adapter[:2]))
        or not weight.is_cpu
        or weight.requires_grad
        or weight.is_inference()
        or type(linear.adapter.scaling) is not float
        or _count_dispatch_modes()
    ):
        return None
    if is_outranged(dtype, linear.adapter):
        return None
    if linear.weight.dtype != dtype:
        linear = linear.cast(dtype)
    known = layer.__dict__.get("_lora_kernels_norms")
    if known is None or not known.are_of(weight, linear):
        known = layer.__dict__["_lora_kernels_norms"] = KnownNorms(weight, linear)
    return known.norm


def _same(t: Tensor, other: Tensor) -> bool:
    return t.dtype == other.dtype and torch.equal(t, other)

"""What a LoRA convolution has beside a call's tensors, which are W, A and B of more dimensions."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.operands.call import Adapter, LinearCall, call_of
from lora_kernels.operands.precision import is_outranged


class Geometry(NamedTuple):
    """How a convolution goes over x, with zeros around it; groups are those of W and B, A has none.

    The product with B is one of kernel size 1.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int

    @property
    def of_a(self) -> "Geometry":
        """The geometry of the product with A."""
        return self._replace(groups=1)

    @property
    def of_b(self) -> "Geometry":
        """The geometry of the product with B."""
        dims = len(self.stride)
        return Geometry((1,) * dims, (0,) * dims, self.groups)


def flat(call: LinearCall, geometry: Geometry) -> tuple[Any, ...]:
    """Return what a forward operator takes after x."""
    weight, _, _, *others = call.flat()
    return weight, *others, *geometry


def conv_call_of(weight: Tensor, *others: Any) -> tuple[LinearCall, Geometry]:
    """Return the call that a forward operator was given, by its arguments after x."""
    *flat_call, stride, padding, groups = others
    geometry = Geometry(tuple(stride), tuple(padding), groups)
    return call_of(weight, None, None, *flat_call), geometry


def branch_dtype(x: Tensor, adapter: Adapter) -> torch.dtype:
    """Return the dtype of the adapter branch: x's, or float32 where adapters outrange it."""
    return torch.float32 if is_outranged(x.dtype, adapter) else x.dtype

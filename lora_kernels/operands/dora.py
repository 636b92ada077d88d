"""A DoRA call: an adapted linear layer's and the length of each row of its sum."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.operands.call import LinearCall


class DoraCall(NamedTuple):
    """y = x Wᵀ + bias + scaling · xa Bᵀ + (g - 1) ⊙ u, but for x; magnitude is [N]."""

    linear: LinearCall
    magnitude: Tensor

    def cast(self, dtype: torch.dtype) -> "DoraCall":
        """Return the call with W and bias as autocast has them."""
        return DoraCall(self.linear.cast(dtype), self.magnitude)

    def flat(self) -> tuple[Any, ...]:
        """Return what a forward operator takes after x."""
        return self.magnitude, *self.linear.flat()

    def gain(self, norm: Tensor) -> Tensor:
        """Return g = magnitude / norm, [N], in the norm's dtype."""
        return self.magnitude.to(norm.dtype) / norm


class Kept(NamedTuple):
    """What backward reads of a forward call: x, xa [M, R] and u [M, N] where wanted, norm [N]."""

    x: Tensor | None
    xa: Tensor | None
    u: Tensor | None
    norm: Tensor


class DoraWanted(NamedTuple):
    """Which gradients a backward call is asked for."""

    dx: bool
    da: bool
    db: bool
    dbias: bool
    dm: bool


class DoraGradients(NamedTuple):
    """The gradients of a call, None where not wanted."""

    dx: Tensor | None
    da: Tensor | None
    db: Tensor | None
    dbias: Tensor | None
    dm: Tensor | None

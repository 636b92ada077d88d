"""A DoRA call: an adapted linear layer's and the length of each row of its sum."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.operands.call import LinearCall

# Of the norm's own rounding: how far two orders of its sum lie apart. 2026-11-30, Zen 3: 2.5 at
# K = 8,192, 4 at 32,768.
SUMS_APART = 16


def gain_of(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return g = magnitude / norm, [N], in the norm's dtype.

    It is 1 where the magnitude is the norm as the magnitude's dtype has it, whoever summed that:
    an adapter at its start is the identity. To derivatives it is a quotient there, too.
    """
    ratio = magnitude.to(norm.dtype) / norm
    off = 1 - ratio
    near = torch.finfo(magnitude.dtype).eps / 2 + SUMS_APART * torch.finfo(norm.dtype).eps
    # 1 - ratio has no rounding there, nor has the sum.
    return ratio + torch.where(off.abs() <= near, off, 0).detach()


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
        """Return g, [N], in the norm's dtype; see `gain_of`."""
        return gain_of(self.magnitude, norm)

    def starts(self, gain: Tensor) -> bool:
        """Whether the layer is its base layer yet, g = 1 and B = 0; on CPUs, which may look."""
        return gain.is_cpu and bool((gain == 1).all()) and not self.linear.adapter.b.any()

    def base_output(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias by the call that torch's own layer makes, bit for bit."""
        weight, _, bias, _ = self.linear
        return torch.nn.functional.linear(x, weight.decode(), bias)


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

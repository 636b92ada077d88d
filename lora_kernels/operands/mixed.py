"""A mixed batch's tensors by name: rows of one linear layer, each with an adapter of its own."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_kernels.operands.call import Adapter, Gradients
from lora_kernels.operands.dropout import Dropout
from lora_kernels.operands.grouped import NO_ADAPTER, GroupedCall, Groups

# dx, dA and dB of each adapter, dbias: what a backward operator returns.
MixedGradients = tuple[Tensor | None, list[Tensor], list[Tensor], Tensor | None]


class MixedCall(NamedTuple):
    """y[m] = x[m] Wᵀ + bias + scalings[o] · D(x[m]) A[o]ᵀ B[o]ᵀ, o the owner of m's sample.

    weight [N, K], bias [N] or None. a, b: A [R, K] and B [N, R] of each adapter, whose ranks and
    dtypes may differ. scalings: float64, one of each. owners: int32, on the CPU, each sample's
    adapter or `NO_ADAPTER`; samples have the same number of rows, one after the other.
    """

    weight: Tensor
    a: list[Tensor]
    b: list[Tensor]
    scalings: Tensor
    owners: Tensor
    bias: Tensor | None
    dropout: Dropout | None

    @property
    def ranks(self) -> int:
        """The largest R, of which xa has columns."""
        return max([a.shape[0] for a in self.a]) if self.a else 0  # as dynamo knows it

    def flat(self) -> tuple[Any, ...]:
        """Return what an operator takes after x: W, bias aside, which backward doesn't read."""
        seed, threshold = self.dropout or (None, 0)
        return self.weight, self.a, self.b, self.scalings, self.owners, seed, threshold

    def as_grouped(self, rows: int) -> tuple[GroupedCall, Tensor]:
        """Return the call of rows sorted by owner, those of none last, and where they are from.

        Ranks that differ are filled with zeros.
        """
        device, count = self.weight.device, len(self.a)
        each = rows // max(len(self.owners), 1)
        numbers = torch.where(self.owners == NO_ADAPTER, count, self.owners)
        samples = torch.argsort(numbers, stable=True).unsqueeze(1)
        order = (samples * each + torch.arange(each, device=samples.device)).view(-1).to(device)
        ends = (torch.bincount(numbers, minlength=count + 1) * each).cumsum(0)
        adapters = torch.tensor([*range(count), NO_ADAPTER], dtype=torch.int32, device=device)
        groups = Groups(
            ends.to(device, torch.int32), order, order, adapters, torch.zeros_like(adapters)
        )
        a, b = _stacked(self.a, 0, self.ranks), _stacked(self.b, 1, self.ranks)
        bias = None if self.bias is None else self.bias.unsqueeze(0)
        adapter = Adapter(a, b, self.scalings.to(device))
        weight = self.weight.unsqueeze(0)
        return GroupedCall(weight, adapter, bias, groups, self.dropout, rows), order

    def gradients(self, found: Gradients) -> MixedGradients:
        """Return the gradients of the call, those of `as_grouped` being known."""
        da, db = found.da, found.db
        return (
            found.dx,
            [] if da is None else [_alone(da[i, : len(a)], a) for i, a in enumerate(self.a)],
            [] if db is None else [_alone(db[i, :, : b.shape[1]], b) for i, b in enumerate(self.b)],
            None if found.dbias is None else found.dbias[0],
        )


def mixed_call_of(bias: Tensor | None, *flat: Any) -> MixedCall:
    """Return the call that an operator was given."""
    *tensors, seed, threshold = flat
    dropout = None if seed is None or threshold == 0 else Dropout(seed, threshold)
    weight, a, b, scalings, owners = tensors
    return MixedCall(weight, a, b, scalings, owners, bias, dropout)


def _stacked(factors: list[Tensor], dim: int, ranks: int) -> Tensor:
    """Return factors one after the other, in a dtype that holds all."""
    filled = []
    for t in factors:
        more = ranks - t.shape[dim]
        # Which copies for no zeros, too.
        filled.append(pad(t, (0, more) if dim else (0, 0, 0, more)) if more else t)
    return torch.stack(filled)


def _alone(part: Tensor, like: Tensor) -> Tensor:
    """Return a part of a stack in memory of its own: no result is another's alias."""
    return part.to(like.dtype, copy=True, memory_format=torch.contiguous_format)

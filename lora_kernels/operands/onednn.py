"""A frozen weight with copies in oneDNN's own layout, made of parts of long float32 sums."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lora_kernels.operands.held import HeldWeight
from lora_kernels.operands.weight import Stored

# Longer float32 sums are made of parts. 2026-11-25, Zen 5: oneDNN's root mean square error is 1.5
# to 1.7 times MKL's up to 1,024 terms and 2.0 to 2.3 times beyond; two parts take 1.02 to 1.1 of
# the time of one.
CHAIN = 1024


class OnednnWeight(HeldWeight):
    """W and its packed copies."""

    format = form = "onednn"

    def __init__(self, weight: Tensor, backward: bool) -> None:
        super().__init__(weight)
        self.both_ways = backward
        self._copies = _packed(self.stored)
        self._transposed = _packed(self.stored.t()) if backward else []
        self.nbytes = sum(t.numel() * t.element_size() for t in self._copies + self._transposed)
        # Implementation and dtype of the last call, if it read the weight itself.
        self.unused: tuple[str, torch.dtype] | None = None

    def tensors(self, backward: bool) -> Stored:
        """Return W and its parts; those of Wᵀ for backward, none where it wasn't packed."""
        return self.stored, self._transposed or None if backward else self._copies


def parts(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the parts of weight [C, L] along L that are summed by themselves, each with its start.

    A part is laid out as oneDNN takes it without falling back to its slow reference: a view where
    columns are adjacent (Wᵀ of a contiguous W), a copy where rows are.
    """
    depth = weight.shape[1]
    count = max(1, -(-depth // CHAIN)) if weight.dtype == torch.float32 else 1
    bounds = [depth * i // count for i in range(count + 1)]
    for start, end in pairwise(bounds):
        part = weight[:, start:end]
        yield start, part if count == 1 or weight.stride(0) == 1 else part.contiguous()


def _packed(weight: Tensor) -> list[Tensor]:
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return [reorder(part.contiguous()) for _, part in parts(weight)]

"""A frozen weight with copies in oneDNN's own layout, made of parts of long float32 sums."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lora_kernels.operands.weight import Stored

# Longer float32 sums are made of parts. 2026-11-25, Zen 5: oneDNN's root mean square error is 1.5
# to 1.7 times MKL's up to 1,024 terms and 2.0 to 2.3 times beyond; two parts take 1.02 to 1.1 of
# the time of one.
CHAIN = 1024


class OnednnWeight:
    """W and its packed copies: those of one version of one memory.

    A weight that was replaced, moved or written to since is not held any more (writes through
    `.data` leave no trace), nor one that is trained. A copied or unpickled module starts without.
    """

    format = form = "onednn"

    def __init__(self, weight: Tensor, backward: bool) -> None:
        # The detached alias shares memory and version counter, and keeps that address from reuse.
        self.stored, self._version = weight.detach(), weight._version
        self.shape, self.dtype, self.both_ways = weight.shape, weight.dtype, backward
        self._copies = _packed(self.stored)
        self._transposed = _packed(self.stored.t()) if backward else []
        self.nbytes = sum(t.numel() * t.element_size() for t in self._copies + self._transposed)
        # Implementation and dtype of the last call, if it read the weight itself.
        self.unused: tuple[str, torch.dtype] | None = None

    def holds(self, weight: Tensor) -> bool:
        """Whether `weight` is still what was packed."""
        mine = self.stored
        return (
            not weight.requires_grad  # fused optimizers leave no trace in the version
            and weight._version == self._version
            and weight.data_ptr() == mine.data_ptr()
            and weight.stride() == mine.stride()  # `.data` may be the same memory read otherwise
            and weight.shape == mine.shape
        )

    def tensors(self, backward: bool) -> Stored:
        """Return W and its parts; those of Wᵀ for backward, none where it wasn't packed."""
        return self.stored, self._transposed or None if backward else self._copies

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W."""
        return self.stored if dtype is None else self.stored.to(dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


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

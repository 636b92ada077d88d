"""D(x) of a convolution's input without its factor, keep · x, whatever order x is stored in.

The mask is that of rows with channels last. Where channels lie one after the other it is turned, a
block at a time: turning x there and back took a third of a 1x1 layer's step. (2026-11-30, Zen 3)
"""

import torch
from torch import Tensor

from lora_kernels.impl.convolution import from_rows, rows_of
from lora_kernels.impl.eager.mask import integer_of, keep_blocks, masked
from lora_kernels.operands.dropout import Dropout


class _Masked:
    """keep · t, formed block by block; in_place: t's memory may be written."""

    def __init__(self, t: Tensor, in_place: bool) -> None:
        self.by_channels, self._like = t.is_contiguous(), t
        self._given = t.flatten(2) if self.by_channels else rows_of(t)
        self._made = self._given if in_place else torch.empty_like(self._given)

    def write(self, rows: slice, positions: int, keep: Tensor) -> None:
        """Form a block, of one sample; keep: [rows, C], or turned where channels come first."""
        at: tuple[int | slice, ...] = (rows,)
        if self.by_channels:
            sample, first = divmod(rows.start, positions)
            at = sample, slice(None), slice(first, first + rows.stop - rows.start)
        masked(self._given[at], keep, out=self._made[at])

    def result(self) -> Tensor:
        """Return what was formed, in t's shape."""
        if self.by_channels:
            return self._made.view(self._like.shape)
        return from_rows(self._made, self._like)


def kept(x: Tensor, dropout: Dropout) -> Tensor:
    """Return keep · x for x [N, C, ...]."""
    side = _Masked(x, False)
    _write([side], x, dropout)
    return side.result()


def kept_both(
    x: Tensor | None, own: Tensor | None, dropout: Dropout
) -> tuple[Tensor | None, Tensor | None]:
    """Return keep · x and keep · own, of one shape or None; own's memory may be written."""
    sides = [t if t is None else _Masked(t, t is own) for t in (x, own)]
    like = own if x is None else x
    if like is not None:
        _write([side for side in sides if side is not None], like, dropout)
    first, second = (side if side is None else side.result() for side in sides)
    return first, second


def _write(sides: list[_Masked], like: Tensor, dropout: Dropout) -> None:
    (n, channels), positions = like.shape[:2], like.shape[2:].numel()
    for rows, lanes in keep_blocks(n * positions, channels, dropout, positions):
        keep = lanes.to(integer_of(like))
        turned = keep.t().contiguous() if any(side.by_channels for side in sides) else keep
        for side in sides:
            side.write(rows, positions, turned if side.by_channels else keep)

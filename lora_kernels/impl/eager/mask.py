"""The keep mask: the bits of the reference's `keep_mask`, a few rows at a time.

On a CPU the compiled generator makes them where it was built (csrc/cpu/keep_lanes.cpp, four times
faster); else ATen does. In ATen calls Philox is bound by passes over memory and by the calls
themselves: so the rounds run in place, both products of a round share each call as the two rows of
one tensor, constants are 0-dim tensors (0.6 µs a call less than Python numbers), and the first
round, of which half is constant, is folded.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.native import absence
from lora_kernels.operands.dropout import (
    KEY_STEPS,
    LANES,
    LEVELS,
    MULTIPLIERS,
    ROUNDS,
    WORD,
    Dropout,
)

# (lanes int16 [count, 8], first counter or all of them, threshold): writes 1 or 0 to every lane.
Fill = Callable[[Tensor, int | Tensor, int], None]

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# 2026-11-24, Zen 4, 2 threads, 2^15, 2^16, 2^17: forward + backward at 512x2048x2048 takes 0.87,
# 0.85, 0.86 of PEFT's time with the compiled generator; ATen's takes 3.3, 2.3, 1.7 ns an element.
BLOCK_COUNTERS = 1 << 16


class _Constants(NamedTuple):
    """What the rounds read, on the mask's device; the rows of [2, 1] tensors serve c0 and c2."""

    word: Tensor
    half: Tensor  # 32, the shift to the upper word
    half_ranges: Tensor  # 0x8000 in each of an int64's four lanes
    multipliers: Tensor  # [2, 1]
    keys: list[Tensor]  # a [2, 1] for each round


def _constants(seed: Tensor) -> _Constants:
    def scalar(value: int) -> Tensor:
        # Filled on the device: a copy from the host would not be allowed in CUDA-graph capture.
        return torch.full((), value, dtype=torch.int64, device=seed.device)

    def column(values: tuple[int, int]) -> Tensor:
        return torch.stack([scalar(value) for value in values]).unsqueeze(1)

    rounds = torch.arange(ROUNDS, device=seed.device)
    key = torch.stack((seed, seed >> 32)).unsqueeze(1)
    keys = (key + column(KEY_STEPS) * rounds) & WORD  # [2, ROUNDS]
    return _Constants(
        word=scalar(WORD),
        half=scalar(32),
        half_ranges=scalar(-0x7FFF7FFF7FFF8000),
        multipliers=column(MULTIPLIERS),
        keys=list(keys.t().unsqueeze(2).unbind(0)),
    )


def keep_blocks(
    rows: int, columns: int, dropout: Dropout, together: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (row slice, int16 [rows of the slice, columns], 1 = keep, 0 = drop) from top to bottom.

    The tensor is valid until the next step: one buffer serves all blocks. together: rows of a
    sample, beyond which no block goes.
    """
    seed, threshold = dropout
    groups, together = -(-columns // LANES), max(1, rows if together is None else together)
    block_rows = max(1, min(together, BLOCK_COUNTERS // max(1, groups)))
    compiled = seed.device.type == "cpu" and absence("cpu") is None
    fill = _compiled_fill(seed) if compiled else _aten_fill(seed, block_rows * groups)
    lanes = torch.empty(block_rows * groups, LANES, dtype=torch.int16, device=seed.device)
    starts = (s + i for s in range(0, rows, together) for i in range(0, together, block_rows))
    for first in starts:
        last = min(first + block_rows, first - first % together + together)
        block = lanes[: (last - first) * groups]
        fill(block, first * groups, threshold)
        yield slice(first, last), block.view(last - first, groups * LANES)[:, :columns]


def keep_rows(named: Tensor, columns: int, dropout: Dropout) -> Iterator[tuple[slice, Tensor]]:
    """Yield as `keep_blocks` does, of the rows of a mask that are named, int64 [S], in that order.

    ATen draws them everywhere: the compiled generator takes counters in a row.
    """
    groups = -(-columns // LANES)
    rows = named.shape[0]
    block_rows = max(1, min(rows, BLOCK_COUNTERS // max(1, groups)))
    fill = _aten_fill(dropout.seed, block_rows * groups)
    lanes = torch.empty(block_rows * groups, LANES, dtype=torch.int16, device=named.device)
    within = torch.arange(groups, device=named.device)
    for first in range(0, rows, block_rows):
        some = slice(first, min(first + block_rows, rows))
        counters = (named[some].unsqueeze(1) * groups + within).view(-1)
        block = lanes[: counters.shape[0]]
        fill(block, counters, dropout.threshold)
        yield some, block.view(-1, groups * LANES)[:, :columns]


def integer_of(v: Tensor) -> torch.dtype:
    """Return the integers of the size of v's elements."""
    return _INTEGER_OF_SIZE[v.element_size()]


def masked(v: Tensor, keep: Tensor, out: Tensor | None = None) -> Tensor:
    """Return v where keep is 1 and +0 where it is 0.

    Multiplying the bit patterns is six times cheaper than multiplying by a bool mask, and drops
    NaN and infinity too.
    """
    integer = integer_of(v)
    target = torch.empty(v.shape, dtype=v.dtype, device=v.device) if out is None else out
    torch.mul(v.view(integer), keep.to(integer), out=target.view(integer))
    return target


def _compiled_fill(seed: Tensor) -> Fill:
    key = int(seed)
    write = torch.ops.lora_kernels.keep_lanes_.default

    def fill(lanes: Tensor, counters: int | Tensor, threshold: int) -> None:
        write(lanes, counters, key, threshold)

    return fill


def _aten_fill(seed: Tensor, most: int) -> Fill:
    constants = _constants(seed)
    scratch = torch.empty(3, 2, most, dtype=torch.int64, device=seed.device)

    def fill(lanes: Tensor, counters: int | Tensor, threshold: int) -> None:
        _fill_words(lanes.view(torch.int64), scratch[..., : lanes.shape[0]], counters, constants)
        # The lanes are offset by half their range, which makes the unsigned test a signed one.
        lanes.ge_(threshold - LEVELS // 2)

    return fill


def _fill_words(
    out: Tensor, scratch: Tensor, counters: int | Tensor, constants: _Constants
) -> None:
    """Write Philox's words of counters, from a first one on or all given, to out [count, 2].

    They are pairs of 64 bits.
    """
    word, half, half_ranges, multipliers, keys = constants
    even, products, spare = scratch.unbind(0)  # even holds c0 and c2
    c0, c2 = even.unbind(0)
    (p0, p1), (c3, c1) = products.unbind(0), spare.unbind(0)
    # Round 1 finds c2 = c3 = 0, so its second product is 0 and the new c0 comes from c1 alone.
    if isinstance(counters, Tensor):
        c1.copy_(counters)
    else:
        torch.arange(counters, counters + out.shape[0], out=c1)
    torch.bitwise_and(c1, word, out=c0)
    torch.mul(c0, multipliers[0], out=c3)
    torch.bitwise_right_shift(c3, half, out=c2).bitwise_and_(word)
    torch.bitwise_right_shift(c1, half, out=c0)
    c1.zero_()
    even.bitwise_xor_(keys[0])
    for key in keys[1:]:
        torch.mul(even, multipliers, out=products)
        # c1 and c3 are whole products of the round before: the mask drops their upper halves.
        torch.bitwise_right_shift(p1, half, out=c0).bitwise_xor_(c1)
        torch.bitwise_right_shift(p0, half, out=c2).bitwise_xor_(c3)
        even.bitwise_and_(word).bitwise_xor_(key)
        products, spare = spare, products
        c3, c1, p0, p1 = p0, p1, c3, c1
    for column, low, high in ((0, c0, c1), (1, c2, c3)):
        high.bitwise_left_shift_(half).bitwise_or_(low)
        torch.bitwise_xor(high, half_ranges, out=out[:, column])

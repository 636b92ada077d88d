"""Device functions: which rows, weight and adapter a row panel of sorted groups has.

A group's row panels begin with its own rows. Their numbers are reserved: its first panel's is
begin // BLOCK_M + group, and up to the next group's there are enough for all its rows. So one
comparison with each group's first number finds a panel's group, the host knows how many numbers
there are, and some panels, at most one a group, have no rows. Rows after the last group count as
one group more.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.memory import wide


@triton.jit
def first_panels(offsets, count, SHAPE: tl.constexpr):
    """Return the number of each group's first panel [PADDED], of no group beyond all panels."""
    group = tl.arange(0, SHAPE.PADDED)
    known = (group > 0) & (group <= SHAPE.GROUPS)
    begin = _inside(tl.load(offsets + group - 1, mask=known, other=0), count)
    return tl.where(group <= SHAPE.GROUPS, begin // SHAPE.BLOCK_M + group, 1 << 30)


@triton.jit
def located(firsts, offsets, panel, count, SHAPE: tl.constexpr):
    """Return a panel's group, its first row, and the group's end: there are no rows beyond.

    The group is GROUPS of rows that no group has.
    """
    group = tl.sum((firsts <= panel).to(tl.int32), 0) - 1
    begin, end = span_of(offsets, group, count, SHAPE)
    own = panel - begin // SHAPE.BLOCK_M - group
    return group, begin + tl.maximum(own, 0) * SHAPE.BLOCK_M, end


@triton.jit
def span_of(offsets, group, count, SHAPE: tl.constexpr):
    """Return where a group begins and ends; inside the tensor, whatever offsets say."""
    begin = tl.load(offsets + group - 1, mask=group > 0, other=0)
    end = tl.load(offsets + group, mask=group < SHAPE.GROUPS, other=count)
    return _inside(begin, count), _inside(end, count)


@triton.jit
def _inside(row, count):
    return tl.minimum(tl.maximum(row, 0), count)


@triton.jit
def number_of(numbers, group, LEAST: tl.constexpr, LIMIT: tl.constexpr):
    """Return a group's adapter or weight, from LEAST to LIMIT - 1; its own without numbers."""
    if numbers is None:
        return group
    else:
        return tl.minimum(tl.maximum(tl.load(numbers + group), LEAST), LIMIT - 1)


@triton.jit
def next_group(
    numbers, wanted, group, LEAST: tl.constexpr, LIMIT: tl.constexpr, SHAPE: tl.constexpr
):
    """Return the first group from `group` on whose number is the wanted one, or GROUPS."""
    if numbers is None:
        return tl.where(group <= wanted, wanted, SHAPE.GROUPS)
    else:
        every = tl.arange(0, SHAPE.PADDED)
        known = (every >= group) & (every < SHAPE.GROUPS)
        found = tl.load(numbers + every, mask=known, other=LEAST - 1)
        found = tl.where(known, tl.minimum(tl.maximum(found, LEAST), LIMIT - 1), LEAST - 1)
        return tl.min(tl.where(found == wanted, every, SHAPE.GROUPS), 0)


@triton.jit
def named_rows(numbers, rows, limit):
    """Return the row that each sorted row names, inside the tensor; its own without numbers."""
    if numbers is None:
        return rows
    else:
        named = tl.load(numbers + rows).to(tl.int32)
        return tl.minimum(tl.maximum(named, 0), limit - 1)


@triton.jit
def places(scatter, rows, end, count):
    """Return the row of y, and of the mask, of each sorted row; `count` from `end` on."""
    own = named_rows(scatter, tl.minimum(rows, end - 1), count)
    return tl.where(rows < end, own, count)


@triton.jit
def matrix_of(stack, number):
    """Return one matrix of a `Stack`."""
    return arguments.Rows(stack.pointer + wide(number) * stack.apart, stack.stride, stack.step)


@triton.jit
def scaling_for(scaling, numbers, adapter):
    """Return an adapter's scaling: the number given, or its own where there are some in memory."""
    if numbers is None:
        return scaling
    else:
        own = tl.load(numbers.pointer + adapter * numbers.stride, mask=adapter >= 0, other=0.0)
        return own.to(tl.float32)

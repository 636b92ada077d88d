"""Device functions: sums over the rows of all groups with one adapter or weight: dA, dB, dbias.

Groups come in order, and the rows of each, so a sum has the same bits in every run. What other
rows hold, infinity for instance, takes no part; who has no rows gets zeros.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.flags import leave, wait
from lora_kernels.impl.triton.kernels.groups import named_rows, next_group, scaling_for, span_of
from lora_kernels.impl.triton.kernels.mask import keep_where, masks_by_element
from lora_kernels.impl.triton.kernels.memory import wide
from lora_kernels.impl.triton.kernels.products import plus_product, read, zeros
from lora_kernels.impl.triton.kernels.sums import store_da, store_dy_sums


@triton.jit
def _plus_rows(
    product, left, right, named, draw, at, SHAPE: tl.constexpr, MODE: tl.constexpr,
    DROPOUT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return product + leftᵀ D(right) over the sorted rows of a `Segment`, m rows of right.

    named: the row of right that each sorted row names, and that of the mask, or None.
    """
    columns = at.column + tl.arange(0, SHAPE.BLOCK_C)
    ranks = at.rank + tl.arange(0, SHAPE.RANKS)
    steps = tl.arange(0, SHAPE.BLOCK_S)
    for first in tl.range(at.row, at.end, SHAPE.BLOCK_S):
        rows = first + steps
        inside = rows < at.end
        near = tl.minimum(rows, at.end - 1)
        source = named_rows(named.source, near, at.m).to(tl.int64)
        pointers = right.pointer + source[:, None] * right.stride + columns[None, :]
        wanted = inside[:, None]
        if WIDTH % SHAPE.BLOCK_C != 0:
            wanted &= (columns < WIDTH)[None, :]
        tile = tl.load(pointers, mask=wanted, other=0.0)
        pointers = left + near.to(tl.int64)[None, :] * SHAPE.R + ranks[:, None]
        wanted = inside[None, :] & (ranks < SHAPE.R)[:, None]
        factor = tl.load(pointers, mask=wanted, other=0.0)
        if DROPOUT:
            drawn = named_rows(named.drawn, near, named.places)
            masks, _ = masks_by_element(drawn, at.column, draw, WIDTH, SHAPE.BLOCK_C, MODE)
            tile = keep_where(masks, tile)
        product = plus_product(product, factor, tile.to(factor.dtype), MODE)
    return product


@triton.jit
def sum_da(
    dxa, x, da, groups, draw, flags, which, SHAPE: tl.constexpr, MODE: tl.constexpr,
    LAST_OUT: tl.constexpr,
):  # fmt: skip
    """Store a block of an adapter's dA = dxaᵀ D(x), once the panels of its groups have dxa.

    which: the tile's number, adapter after adapter, and how many rows are sorted, and are x's.
    """
    SLABS: tl.constexpr = SHAPE.BLOCK_R // SHAPE.RANKS
    BLOCKS: tl.constexpr = (SHAPE.K + SHAPE.BLOCK_C - 1) // SHAPE.BLOCK_C * SLABS
    tile, count, tokens = which
    adapter = tile // BLOCKS
    column = tile % BLOCKS // SLABS * SHAPE.BLOCK_C
    rank = tile % SLABS * SHAPE.RANKS
    named = arguments.Named(groups.rows, groups.scatter, count)
    product = zeros(SHAPE.RANKS, SHAPE.BLOCK_C)
    group = next_group(groups.adapters, adapter, 0, -1, SHAPE.ADAPTERS, SHAPE)
    while group < SHAPE.GROUPS:
        begin, end = span_of(groups.offsets, group, count, SHAPE)
        first = begin // SHAPE.BLOCK_M + group
        beyond = first + tl.cdiv(tl.maximum(end - begin, 0), SHAPE.BLOCK_M)
        for panel in range(first, beyond):
            wait(flags + panel, 1)
        rows = arguments.Segment(begin, end, tokens, column, rank, SHAPE.K)
        product = _plus_rows(
            product, dxa, x, named, draw, rows, SHAPE, MODE, DROPOUT=MODE.DROPOUT, WIDTH=SHAPE.K
        )
        for panel in range(first, beyond):
            leave(flags + panel, LAST_OUT)
        group = next_group(groups.adapters, adapter, group + 1, -1, SHAPE.ADAPTERS, SHAPE)
    store_da(da + wide(adapter) * (SHAPE.R * SHAPE.K), read(product, MODE), column, rank, SHAPE)


@triton.jit
def sum_db(
    xa, dy, db, groups, scaling, scalings, tile, count, SHAPE: tl.constexpr, MODE: tl.constexpr
):
    """Store a block of an adapter's dB = scaling · dyᵀ xa; tile: its number, adapter by adapter."""
    SLABS: tl.constexpr = SHAPE.BLOCK_R // SHAPE.RANKS
    BLOCKS: tl.constexpr = (SHAPE.N + SHAPE.BLOCK_C - 1) // SHAPE.BLOCK_C * SLABS
    adapter = tile // BLOCKS
    column = tile % BLOCKS // SLABS * SHAPE.BLOCK_C
    rank = tile % SLABS * SHAPE.RANKS
    named = arguments.Named(groups.scatter, None, count)
    product = zeros(SHAPE.RANKS, SHAPE.BLOCK_C)
    group = next_group(groups.adapters, adapter, 0, -1, SHAPE.ADAPTERS, SHAPE)
    while group < SHAPE.GROUPS:
        begin, end = span_of(groups.offsets, group, count, SHAPE)
        rows = arguments.Segment(begin, end, count, column, rank, SHAPE.N)
        product = _plus_rows(
            product, xa, dy, named, None, rows, SHAPE, MODE, DROPOUT=False, WIDTH=SHAPE.N
        )
        group = next_group(groups.adapters, adapter, group + 1, -1, SHAPE.ADAPTERS, SHAPE)
    scale = scaling_for(scaling, scalings, adapter)
    own = arguments.DySums(db + wide(adapter) * (SHAPE.N * SHAPE.R), None)
    store_dy_sums(own, read(product, MODE), None, scale, column, rank, SHAPE)


@triton.jit
def sum_dbias(dy, dbias, groups, tile, count, SHAPE: tl.constexpr):
    """Store a block of a weight's dbias, the sum of dy; tile: its number, weight after weight."""
    BLOCK_C: tl.constexpr = SHAPE.BLOCK_C
    BLOCKS: tl.constexpr = (SHAPE.N + BLOCK_C - 1) // BLOCK_C
    weight = tile // BLOCKS
    columns = tile % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    steps = tl.arange(0, SHAPE.BLOCK_S)
    total = tl.zeros((BLOCK_C,), tl.float32)
    group = next_group(groups.weights, weight, 0, 0, SHAPE.WEIGHTS, SHAPE)
    while group < SHAPE.GROUPS:
        begin, end = span_of(groups.offsets, group, count, SHAPE)
        for first in tl.range(begin, end, SHAPE.BLOCK_S):
            rows = first + steps
            source = named_rows(groups.scatter, tl.minimum(rows, end - 1), count).to(tl.int64)
            pointers = dy.pointer + source[:, None] * dy.stride + columns[None, :]
            wanted = (rows < end)[:, None] & (columns < SHAPE.N)[None, :]
            total += tl.sum(tl.load(pointers, mask=wanted, other=0.0).to(tl.float32), 0)
        group = next_group(groups.weights, weight, group + 1, 0, SHAPE.WEIGHTS, SHAPE)
    own = dbias + wide(weight) * SHAPE.N
    tl.store(own + columns, total.to(dbias.dtype.element_ty), mask=columns < SHAPE.N)

"""Device functions: sums over rows, the tiles of dA, dB and dbias."""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels.mask import keep_where, masks_by_element
from lora_kernels.impl.triton.kernels.tiles import (
    block_pointers,
    inverse_of,
    opaque,
    plus_product,
    read,
    settled,
    wide,
)


@triton.jit
def row_sums(
    left, units, right, mask, right_stride, row, end, column, rank, M, seed, threshold,
    UNIT_ROWS: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, MASK_STRIDE: tl.constexpr,
    RANKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, DROPOUT: tl.constexpr,
    WIDE: tl.constexpr, PACKED: tl.constexpr, PRODUCT: tl.constexpr, SUM: tl.constexpr,
    MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return Σ leftᵀ D(right) and Σ right over rows [row, end), float32, in order of rows.

    left [M, R] contiguous, of which RANKS columns from `rank` on; right [M, WIDTH], of which
    BLOCK_C from `column` on. units: left's, one for each UNIT_ROWS rows, a multiple of BLOCK_S;
    None: 1. mask: where the bits of D go, or None.
    """
    product = tl.zeros((RANKS, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    if units is None:
        product, total = _plus_rows(
            product, total, left, right, mask, right_stride, row, end, column, rank, M, seed,
            threshold, WIDTH, R, MASK_STRIDE, RANKS, BLOCK_C, BLOCK_S, DROPOUT, WIDE, PACKED,
            PRODUCT, SUM, MMA, PRECISION,
        )  # fmt: skip
        product = read(product, MMA)
    else:
        # Rows of one unit are summed by one loop; as a rule they are all. Units of rows beyond the
        # part may not be there yet.
        final = tl.minimum(end, M) - 1
        unit = tl.load(units + row // UNIT_ROWS)
        while row < end:
            before = unit
            unit = tl.load(units + row // UNIT_ROWS)
            stop = row + UNIT_ROWS
            while (stop < end) & (tl.load(units + tl.minimum(stop, final) // UNIT_ROWS) == unit):
                stop += UNIT_ROWS
            stop = tl.minimum(stop, end)
            product, total = _plus_rows(
                product * (before * inverse_of(unit)), total, left, right, mask, right_stride, row,
                stop, column, rank, M, seed, threshold, WIDTH, R, MASK_STRIDE, RANKS, BLOCK_C,
                BLOCK_S, DROPOUT, WIDE, PACKED, PRODUCT, SUM, MMA, PRECISION,
            )  # fmt: skip
            product = read(product, MMA)
            row = stop
        product *= unit
    return product, total


@triton.jit
def _plus_rows(
    product, total, left, right, mask, right_stride, row, end, column, rank, M, seed, threshold,
    WIDTH: tl.constexpr, R: tl.constexpr, MASK_STRIDE: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr,
    PACKED: tl.constexpr, PRODUCT: tl.constexpr, SUM: tl.constexpr, MMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return product + leftᵀ D(right) and total + right, summed over rows [row, end)."""
    columns = column + tl.arange(0, BLOCK_C)
    ranks = rank + tl.arange(0, RANKS)
    steps = tl.arange(0, BLOCK_S)
    near = tl.minimum(steps, M - 1)
    right_pointers = block_pointers(right, near, right_stride, column, BLOCK_C)
    if PRODUCT:
        left_pointers = left + near.to(tl.int64)[None, :] * R + ranks[:, None]
    if mask is not None:
        # A byte is a group. In neighbouring threads, as `masks` below; Triton would lay several
        # side by side in one to store words, and draw them once more there.
        groups = opaque(column // 8 + tl.arange(0, BLOCK_C // 8))
        mask_pointers = mask.to(tl.pointer_type(tl.uint8)) + (
            steps[:, None] * (4 * MASK_STRIDE) + groups[None, :]
        )
    last = tl.maximum(M - BLOCK_S, 0)
    for first in tl.range(row, end, BLOCK_S):
        # The last step starts early enough to stay inside; the rows that it meets again, zeros on
        # the left, count nothing. So no step masks or clamps what it reads on the right.
        start = tl.minimum(first, last)
        rows = start + steps
        inside = (rows >= first) & (rows < M)
        pointers = right_pointers + wide(start) * right_stride
        if WIDTH % BLOCK_C == 0:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
        if PRODUCT:
            wanted = inside[None, :]
            if R % RANKS != 0:
                wanted &= (ranks < R)[:, None]
            factor = tl.load(left_pointers + wide(start) * R, mask=wanted, other=0.0)
            kept = tile
            if DROPOUT:
                masks, bits = masks_by_element(
                    rows, column, seed, threshold, WIDTH, BLOCK_C, WIDE, PACKED
                )
                kept = keep_where(masks, tile)
                if mask is not None:
                    tl.store(
                        mask_pointers + wide(start) * (4 * MASK_STRIDE),
                        bits.to(tl.uint8),
                        mask=(steps >= first - start)[:, None],
                    )
            product = plus_product(product, factor, kept, PRECISION)
            if SUM and MMA == "wgmma":
                # Triton 3.8 leaves this product pending while the next copy overwrites `right`.
                product = settled(product)
        if SUM:
            total += tl.sum(tl.where(inside[:, None], tile, 0.0).to(tl.float32), 0)
    return product, total


@triton.jit
def sum_of_parts(
    product, total, space, counter, part, parts, RANKS: tl.constexpr, BLOCK_C: tl.constexpr,
    PRODUCT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Return the sums over all parts, in order, and True to the last part to arrive, else False.

    space: float32 [parts, RANKS + 1, BLOCK_C]; counter: int32, zero before and after.
    """
    last = True
    if parts > 1:
        SIZE: tl.constexpr = (RANKS + 1) * BLOCK_C
        row = tl.arange(0, BLOCK_C)
        tile = tl.arange(0, RANKS)[:, None] * BLOCK_C + row[None, :]
        if PRODUCT:
            tl.store(space + part * SIZE + tile, product)
        if SUM:
            tl.store(space + part * SIZE + RANKS * BLOCK_C + row, total)
        tl.debug_barrier()
        last = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
        if last:
            tl.debug_barrier()
            tl.atomic_xchg(counter, 0, sem="relaxed")
            product = tl.zeros((RANKS, BLOCK_C), tl.float32)
            total = tl.zeros((BLOCK_C,), tl.float32)
            for i in range(parts):
                if PRODUCT:
                    product += tl.load(space + i * SIZE + tile)
                if SUM:
                    total += tl.load(space + i * SIZE + RANKS * BLOCK_C + row)
    return product, total, last

"""Device functions: sums over rows, the tiles of dA, dB and dbias."""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.mask import keep_where, masks_by_element
from lora_kernels.impl.triton.kernels.memory import block_pointers, wide
from lora_kernels.impl.triton.kernels.products import opaque, plus_product, read, settled, zeros
from lora_kernels.impl.triton.kernels.units import inverse_of


@triton.jit
def row_sums(
    left, right, draw, at, SHAPE: tl.constexpr, MODE: tl.constexpr, DROPOUT: tl.constexpr,
    PRODUCT: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """Return Σ leftᵀ D(right) and Σ right over the rows of a `Segment`, float32, in their order.

    left: a `Factor`, of which RANKS columns, with units for multiples of BLOCK_S rows.
    right: `Rows` [M, WIDTH], of which BLOCK_C columns. Bits of D are left in draw's mask, if any.
    """
    BLOCK_C: tl.constexpr = SHAPE.BLOCK_C
    row = at.row
    product = zeros(SHAPE.RANKS, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    if left.units is None:
        product, total = _plus_rows(
            arguments.Sums(product, total), left.numbers, right, draw, at, SHAPE, MODE,
            DROPOUT=DROPOUT, PRODUCT=PRODUCT, TOTAL=TOTAL,
        )  # fmt: skip
        product = read(product, MODE)
    else:
        # Rows of one unit are summed by one loop; as a rule they are all. Units of rows beyond the
        # part may not be there yet.
        final = tl.minimum(at.end, at.m) - 1
        unit = tl.load(left.units + row // SHAPE.UNIT_ROWS)
        while row < at.end:
            before = unit
            unit = tl.load(left.units + row // SHAPE.UNIT_ROWS)
            stop = row + SHAPE.UNIT_ROWS
            while (stop < at.end) & (
                tl.load(left.units + tl.minimum(stop, final) // SHAPE.UNIT_ROWS) == unit
            ):
                stop += SHAPE.UNIT_ROWS
            stop = tl.minimum(stop, at.end)
            rows = arguments.Segment(row, stop, at.m, at.column, at.rank, at.WIDTH)
            product, total = _plus_rows(
                arguments.Sums(product * (before * inverse_of(unit)), total), left.numbers, right,
                draw, rows, SHAPE, MODE, DROPOUT=DROPOUT, PRODUCT=PRODUCT, TOTAL=TOTAL,
            )  # fmt: skip
            product = read(product, MODE)
            row = stop
        product *= unit
    return product, total


@triton.jit
def _plus_rows(
    sums, left, right, draw, at, SHAPE: tl.constexpr, MODE: tl.constexpr, DROPOUT: tl.constexpr,
    PRODUCT: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """Return `Sums` plus leftᵀ D(right) and right, summed over the rows of a `Segment`."""
    R: tl.constexpr = SHAPE.R
    RANKS: tl.constexpr = SHAPE.RANKS
    BLOCK_C: tl.constexpr = SHAPE.BLOCK_C
    BLOCK_S: tl.constexpr = SHAPE.BLOCK_S
    DRAWN: tl.constexpr = DROPOUT and draw.mask is not None
    product = sums.product
    total = sums.total
    columns = at.column + tl.arange(0, BLOCK_C)
    ranks = at.rank + tl.arange(0, RANKS)
    steps = tl.arange(0, BLOCK_S)
    near = tl.minimum(steps, at.m - 1)
    right_pointers = block_pointers(right.pointer, near, right.stride, at.column, BLOCK_C)
    if PRODUCT:
        left_pointers = left + near.to(tl.int64)[None, :] * R + ranks[:, None]
    if DRAWN:
        MASK_BYTES: tl.constexpr = 4 * SHAPE.MASK_STRIDE
        # A byte is a group. In neighbouring threads, as `masks` below; Triton would lay several
        # side by side in one to store words, and draw them once more there.
        groups = opaque(at.column // 8 + tl.arange(0, BLOCK_C // 8))
        mask_pointers = draw.mask.to(tl.pointer_type(tl.uint8)) + (
            steps[:, None] * MASK_BYTES + groups[None, :]
        )
    last = tl.maximum(at.m - BLOCK_S, 0)
    for first in tl.range(at.row, at.end, BLOCK_S):
        # The last step starts early enough to stay inside; the rows that it meets again, zeros on
        # the left, count nothing. So no step masks or clamps what it reads on the right.
        start = tl.minimum(first, last)
        rows = start + steps
        inside = (rows >= first) & (rows < at.m)
        pointers = right_pointers + wide(start) * right.stride
        if at.WIDTH % BLOCK_C == 0:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(columns < at.WIDTH)[None, :], other=0.0)
        if PRODUCT:
            wanted = inside[None, :]
            if R % RANKS != 0:
                wanted &= (ranks < R)[:, None]
            factor = tl.load(left_pointers + wide(start) * R, mask=wanted, other=0.0)
            kept = tile
            if DROPOUT:
                masks, bits = masks_by_element(rows, at.column, draw, at.WIDTH, BLOCK_C, MODE)
                kept = keep_where(masks, tile)
                if DRAWN:
                    tl.store(
                        mask_pointers + wide(start) * MASK_BYTES,
                        bits.to(tl.uint8),
                        mask=(steps >= first - start)[:, None],
                    )
            product = plus_product(product, factor, kept, MODE)
            if TOTAL and MODE.MMA == "wgmma":
                # Triton 3.8 leaves this product pending while the next copy overwrites `right`.
                product = settled(product)
        if TOTAL:
            total += tl.sum(tl.where(inside[:, None], tile, 0.0).to(tl.float32), 0)
    return product, total


@triton.jit
def sum_of_parts(
    product, total, space, counter, part, parts, SHAPE: tl.constexpr, PRODUCT: tl.constexpr,
    TOTAL: tl.constexpr,
):  # fmt: skip
    """Return the sums over all parts, in order, and True to the last part to arrive, else False.

    space: float32 [parts, RANKS + 1, BLOCK_C]; counter: int32, zero before and after.
    """
    RANKS: tl.constexpr = SHAPE.RANKS
    BLOCK_C: tl.constexpr = SHAPE.BLOCK_C
    last = True
    if parts > 1:
        SIZE: tl.constexpr = (RANKS + 1) * BLOCK_C
        row = tl.arange(0, BLOCK_C)
        tile = tl.arange(0, RANKS)[:, None] * BLOCK_C + row[None, :]
        if PRODUCT:
            tl.store(space + part * SIZE + tile, product)
        if TOTAL:
            tl.store(space + part * SIZE + RANKS * BLOCK_C + row, total)
        tl.debug_barrier()
        last = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
        if last:
            tl.debug_barrier()
            tl.atomic_xchg(counter, 0, sem="relaxed")
            product = zeros(RANKS, BLOCK_C)
            total = tl.zeros((BLOCK_C,), tl.float32)
            for i in range(parts):
                if PRODUCT:
                    product += tl.load(space + i * SIZE + tile)
                if TOTAL:
                    total += tl.load(space + i * SIZE + RANKS * BLOCK_C + row)
    return product, total, last


@triton.jit
def sum_dy(xa, dy, out, shared, number, segment, m, scale, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Sum a segment's part of a block of dB and dbias; whoever comes last stores them whole.

    number: of the tile, segment after segment, block after block of dB.
    """
    RANKS: tl.constexpr = SHAPE.RANKS
    BLOCK_C: tl.constexpr = SHAPE.BLOCK_C
    PRODUCT: tl.constexpr = out.db is not None
    TOTAL: tl.constexpr = out.dbias is not None
    SLABS: tl.constexpr = SHAPE.BLOCK_R // RANKS
    BLOCKS: tl.constexpr = (SHAPE.N + BLOCK_C - 1) // BLOCK_C * SLABS
    block = number % BLOCKS
    part = number // BLOCKS
    parts = tl.cdiv(m, segment)
    column = block // SLABS * BLOCK_C
    rank = block % SLABS * RANKS
    end = tl.minimum(part * segment + segment, m)
    product, total = row_sums(
        arguments.Factor(xa, None), dy, arguments.Draw(0, 0, None),
        arguments.Segment(part * segment, end, m, column, rank, SHAPE.N), SHAPE, MODE,
        DROPOUT=False, PRODUCT=PRODUCT, TOTAL=TOTAL,
    )  # fmt: skip
    space = shared.partials + wide(block) * parts * (RANKS + 1) * BLOCK_C
    product, total, last = sum_of_parts(
        product, total, space, shared.counters + block, part, parts, SHAPE,
        PRODUCT=PRODUCT, TOTAL=TOTAL,
    )  # fmt: skip
    if last:
        store_dy_sums(out, product, total, scale, column, rank, SHAPE)


@triton.jit
def store_dy_sums(out, product, total, scale, column, rank, SHAPE: tl.constexpr):
    """Store scale times a block of dBᵀ, and dbias of its columns, where they are wanted."""
    columns = column + tl.arange(0, SHAPE.BLOCK_C)
    if out.db is not None:
        ranks = rank + tl.arange(0, SHAPE.RANKS)
        inside = (columns < SHAPE.N)[:, None] & (ranks < SHAPE.R)[None, :]
        pointers = out.db + columns[:, None] * SHAPE.R + ranks[None, :]
        result = (product * scale).to(out.db.dtype.element_ty)
        tl.store(pointers, result.T, mask=inside)
    if out.dbias is not None:
        # Every slab of ranks summed dy; the first one's sum is kept.
        inside = (columns < SHAPE.N) & (rank == 0)
        tl.store(out.dbias + columns, total.to(out.dbias.dtype.element_ty), mask=inside)


@triton.jit
def store_da(da, product, column, rank, SHAPE: tl.constexpr):
    """Store a block of dA."""
    columns = column + tl.arange(0, SHAPE.BLOCK_C)
    ranks = rank + tl.arange(0, SHAPE.RANKS)
    inside = (ranks < SHAPE.R)[:, None] & (columns < SHAPE.K)[None, :]
    pointers = da + ranks[:, None] * SHAPE.K + columns[None, :]
    tl.store(pointers, product.to(da.dtype.element_ty), mask=inside)

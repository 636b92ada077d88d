"""The backward kernel: dx, dA, dB and dbias in one launch, by kinds of tiles.

    dx = dy W + D(dxa A)      dA = dxaᵀ D(x)      dB = scaling · dyᵀ xa      dxa = scaling · dy B

A program takes tiles by number until there are none. There are four kinds, in this order:

1. The first column of dx. A tile sums dy W and dxa = dy B over N in one loop, stores dxa and
   publishes it by its row panel's flag. Then it adds D(dxa A) and stores dx.
2. dB and dbias. A tile sums dyᵀ xa, and dy itself, over the rows of a segment, and waits for
   nothing.
3. dA. A tile waits for the dxa of its segment's rows, draws D, leaves D's bits for the tiles of dx
   that follow, and sums dxaᵀ D(x).
4. The other columns of dx. A tile sums dy W, waits for dxa and for D's bits, adds D(dxa A) and
   stores dx.

Tiles of dA and dB take rows in order, and whoever comes last adds the segments in order. So no
result needs atomics, and all have the same bits in every run; reading dy once more is the price.
They stand between the two kinds of dx: memory-bound work beside compute-bound work.
docs/kernels.md draws this, and says why no order of programs can deadlock.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels.mask import (
    choose,
    keep_where,
    masks_by_bits,
    masks_by_call,
)
from lora_kernels.impl.triton.kernels.sums import row_sums, sum_of_parts
from lora_kernels.impl.triton.kernels.tiles import (
    block_pointers,
    grouped_tile,
    inverse_of,
    keep_scale,
    leave,
    load_factor,
    load_operand,
    opaque,
    operand_pointers,
    plus_product,
    publish,
    read,
    rounded_now,
    scaling_of,
    store_factor,
    store_tile,
    take,
    unfetched,
    unit_of,
    wait,
    wide,
)


@triton.jit
def _dx_tile(
    tile, panels, dxa_end, da_end, COLUMNS: tl.constexpr, FUSED: tl.constexpr, GROUP: tl.constexpr
):
    """Return (row panel, column) of a tile of dx: before `dxa_end` column 0, which makes dxa."""
    REST: tl.constexpr = COLUMNS - FUSED if COLUMNS > FUSED else 1
    panel, column = grouped_tile(tl.maximum(tile - da_end, 0), panels, REST, GROUP)
    first = tile < dxa_end
    return tl.where(first, tile, panel), tl.where(first, 0, column + FUSED)


@triton.jit
def _products(
    dy_descriptor, w_descriptor, dy_pointers, w, b, row, column, stride_w, stride_b,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BASE: tl.constexpr, SHRINK: tl.constexpr, MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dy W of the tile at (row, column) if BASE, and dy B of its rows if SHRINK, float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    shrunk = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    steps = tl.arange(0, BLOCK_N)
    columns = column + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    w_pointers = operand_pointers(w, w_descriptor, steps, stride_w, column, BLOCK_K)
    b_pointers = block_pointers(b, steps, stride_b, 0, BLOCK_R)
    for n in tl.range(0, N, BLOCK_N):
        dy_tile = load_operand(dy_descriptor, dy_pointers, row, n, N, BLOCK_N)
        inside = (n + steps < N)[:, None]
        if BASE:
            if w_descriptor is not None:
                w_tile = w_descriptor.load([n, column])
            else:
                pointers = w_pointers + wide(n) * stride_w
                if N % BLOCK_N == 0 and K % BLOCK_K == 0:
                    w_tile = tl.load(pointers)
                else:
                    w_tile = tl.load(pointers, mask=inside & (columns < K)[None, :], other=0.0)
            base_tile = dy_tile
            if MMA == "mma" and dy_tile.dtype != tl.float32:
                base_tile = unfetched(dy_tile)
            acc = plus_product(acc, base_tile, w_tile, PRECISION)
        if SHRINK:
            pointers = b_pointers + wide(n) * stride_b
            if N % BLOCK_N == 0 and R == BLOCK_R:
                b_tile = tl.load(pointers)
            else:
                b_tile = tl.load(pointers, mask=inside & (ranks < R)[None, :], other=0.0)
            shrunk = plus_product(shrunk, dy_tile, b_tile.to(dy_tile.dtype), PRECISION)
    return acc, shrunk


@triton.jit
def _finish_dx(
    acc, dxa, units, a, dx, mask, drawn, row, column, M, seed, threshold, stride_a,
    UNIT_ROWS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, MASK_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, RANK_STEP: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, MMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add D(dxa A) to dy W, where dxa holds the factor of kept elements, and store dx.

    drawn: whether tiles of dA have left D's bits in `mask`; float32 has no `mask`.
    """
    dtype: tl.constexpr = dx.dtype.element_ty
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_K)
    near_rows = tl.minimum(rows, M - 1)
    if DROPOUT:
        if dtype == tl.float32:
            # Its product's operands lie in registers: there is room for the mask only afterwards.
            dropped = acc
            acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        else:
            if mask is not None and drawn:
                pointers = block_pointers(mask, near_rows, MASK_STRIDE, column // 32, BLOCK_K // 32)
                masks = masks_by_bits(tl.load(pointers).to(tl.uint32, bitcast=True))
            else:
                masks = masks_by_call(rows, column, seed, threshold, K, BLOCK_K, WIDE, PACKED)
            dropped = rounded_now(acc, dtype)
    if units is not None:
        # In dx nothing counts that float16 itself doesn't hold: a small unit goes to dxa, a large
        # one, the largest of the tile, to A.
        if UNIT_ROWS % BLOCK_M == 0:
            unit = tl.load(units + row // UNIT_ROWS)
            above = tl.maximum(unit, 1.0)
            below = unit * inverse_of(above)
        else:
            unit = tl.load(units + near_rows // UNIT_ROWS)
            above = tl.maximum(tl.max(unit, 0), 1.0)
            below = (unit * inverse_of(above))[:, None]
    for rank in tl.static_range(0, BLOCK_R, RANK_STEP):
        dxa_tile = load_factor(dxa, near_rows, R, rank, R, RANK_STEP, R == BLOCK_R)
        ranks = rank + tl.arange(0, RANK_STEP)
        a_pointers = block_pointers(a, ranks, stride_a, column, BLOCK_K)
        if R == BLOCK_R and K % BLOCK_K == 0:
            a_tile = tl.load(a_pointers)
        else:
            inside = (ranks < R)[:, None] & (columns < K)[None, :]
            a_tile = tl.load(a_pointers, mask=inside, other=0.0)
        if units is not None:
            dxa_tile = (dxa_tile.to(tl.float32) * below).to(dtype)
            a_tile = a_tile.to(tl.float32) * above
        acc = plus_product(acc, dxa_tile, a_tile.to(dxa_tile.dtype), PRECISION)
    result = read(acc, MMA).to(dtype)
    if DROPOUT:
        if dtype == tl.float32:
            masks = masks_by_call(rows, column, seed, threshold, K, BLOCK_K, WIDE, PACKED)
            result = dropped + keep_where(masks, result)
        else:
            result = choose(masks, result, dropped)
    store_tile(dx, result, rows, columns, M, K, K % BLOCK_K == 0)


@triton.jit(do_not_specialize=["M", "scaling", "threshold", "segment"])
def backward_kernel(
    dy, x, xa, w, a, b, seed_pointer, scaling_pointer, dxa, units, dx, da, db, dbias, mask,
    partials, counters, flags, dy_descriptor, w_descriptor,
    stride_dy, stride_x, stride_w, stride_a, stride_b, segment, M, scaling, threshold,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, MASK_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr, RANKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    GROUP: tl.constexpr, UNIT_ROWS: tl.constexpr, FUSED: tl.constexpr, NEED_DX: tl.constexpr,
    NEED_DA: tl.constexpr, NEED_DB: tl.constexpr, NEED_DBIAS: tl.constexpr, DROPOUT: tl.constexpr,
    WIDE: tl.constexpr, PACKED: tl.constexpr, MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients asked for; persistent, tiles in order, outputs contiguous.

    With FUSED the first tiles make dxa [M, R]; otherwise an earlier launch has. Tiles wait for
    earlier ones alone, so that one running program is enough.
    segment: rows a tile of dA or dB sums, a multiple of BLOCK_M.
    dy_descriptor, w_descriptor: blocks [BLOCK_M, BLOCK_N] and [BLOCK_N, BLOCK_K], or both None.
    units: float32, dxa's, one for each UNIT_ROWS rows (`unit_of`), made with it; None: 1.
    flags: int32, one a row panel and the ticket; counters: int32, one a block of dB and dA; zero
    before and after.
    mask: int32 [max(M, BLOCK_S), MASK_STRIDE], a bit for each element of x; None: all tiles draw.
    Tiles of dA, drawing it beside their copies, leave it to those of dx.
    partials: float32 [blocks, segments, RANKS + 1, BLOCK_C] if there are several segments.
    """
    COLUMNS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SLABS: tl.constexpr = BLOCK_R // RANKS
    DB_BLOCKS: tl.constexpr = (N + BLOCK_C - 1) // BLOCK_C * SLABS
    DA_BLOCKS: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C * SLABS
    DY_SUMS: tl.constexpr = NEED_DB or NEED_DBIAS
    panels = tl.cdiv(M, BLOCK_M)
    parts = tl.cdiv(M, segment)
    dxa_end = panels * FUSED
    db_end = dxa_end + DB_BLOCKS * parts * DY_SUMS
    da_end = db_end + DA_BLOCKS * parts * NEED_DA
    tiles = da_end + panels * (COLUMNS - FUSED) * NEED_DX
    DRAWN: tl.constexpr = mask is not None
    # What the flag counts when a later tile of dx may go on: dxa is published, and where tiles of
    # dA draw D, the tile that made dxa has left, and so have these.
    before: tl.constexpr = 2 * FUSED + DA_BLOCKS if DRAWN else 1
    # What the last tile to leave a row panel finds: a publish, and the other tiles' leaves.
    last_out = FUSED + COLUMNS * NEED_DX + DA_BLOCKS * NEED_DA - 1
    scale = scaling_of(scaling, scaling_pointer)
    # dxa carries the factor of kept elements, so that neither dx nor dA is multiplied by it.
    shrink_scale = scale * keep_scale(threshold)
    seed = wide(0)
    if DROPOUT:
        seed = tl.load(seed_pointer)
    number = 0
    while number < tiles:
        number = take(flags + panels, tiles)
        # Of one turn, or none: out of this loop nothing is hoisted, which would fill registers.
        for tile in tl.range(number, tl.minimum(opaque(number + 1), tiles), disable_licm=True):
            if tile < dxa_end or tile >= da_end:
                panel, panel_column = _dx_tile(tile, panels, dxa_end, da_end, COLUMNS, FUSED, GROUP)
                row = panel * BLOCK_M
                column = panel_column * BLOCK_K
                rows = row + tl.arange(0, BLOCK_M)
                near_rows = tl.minimum(rows, M - 1)
                dy_pointers = operand_pointers(dy, dy_descriptor, near_rows, stride_dy, 0, BLOCK_N)
                if FUSED and tile < dxa_end:
                    acc, shrunk = _products(
                        dy_descriptor, w_descriptor, dy_pointers, w, b, row, column, stride_w,
                        stride_b, N, K, R, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, NEED_DX, True, MMA,
                        PRECISION,
                    )  # fmt: skip
                    shrunk = read(shrunk, MMA) * shrink_scale
                    if units is not None:
                        unit = unit_of(shrunk)
                        tl.store(units + panel, unit)
                        shrunk *= inverse_of(unit)
                    store_factor(dxa, shrunk, rows, M, R, BLOCK_R)
                    publish(flags + panel)
                else:
                    acc, _ = _products(
                        dy_descriptor, w_descriptor, dy_pointers, w, b, row, column, stride_w,
                        stride_b, N, K, R, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, NEED_DX, False, MMA,
                        PRECISION,
                    )  # fmt: skip
                if NEED_DX:
                    if FUSED or DRAWN:
                        wait(flags + panel, tl.where(tile < dxa_end, 1, before))
                    _finish_dx(
                        acc, dxa, units, a, dx, mask, tile >= dxa_end, row, column, M, seed,
                        threshold, stride_a, UNIT_ROWS, K, R, MASK_STRIDE, BLOCK_M, BLOCK_K,
                        BLOCK_R, RANK_STEP, DROPOUT, WIDE, PACKED, MMA, PRECISION,
                    )  # fmt: skip
                    if FUSED or DRAWN:
                        leave(flags + panel, last_out)
            elif DY_SUMS and tile < db_end:
                block = (tile - dxa_end) % DB_BLOCKS
                part = (tile - dxa_end) // DB_BLOCKS
                column = block // SLABS * BLOCK_C
                rank = block % SLABS * RANKS
                end = tl.minimum(part * segment + segment, M)
                product, total = row_sums(
                    xa, None, dy, None, stride_dy, part * segment, end, column, rank, M, seed,
                    threshold, 1, N, R, 0, RANKS, BLOCK_C, BLOCK_S, False, WIDE, PACKED, NEED_DB,
                    NEED_DBIAS, MMA, PRECISION,
                )  # fmt: skip
                space = partials + wide(block) * parts * (RANKS + 1) * BLOCK_C
                product, total, last = sum_of_parts(
                    product, total, space, counters + block, part, parts, RANKS, BLOCK_C, NEED_DB,
                    NEED_DBIAS,
                )  # fmt: skip
                if last:
                    columns = column + tl.arange(0, BLOCK_C)
                    if NEED_DB:
                        ranks = rank + tl.arange(0, RANKS)
                        inside = (columns < N)[:, None] & (ranks < R)[None, :]
                        pointers = db + columns[:, None] * R + ranks[None, :]
                        result = (product * scale).to(db.dtype.element_ty)
                        tl.store(pointers, result.T, mask=inside)
                    if NEED_DBIAS:
                        # Every slab of ranks summed dy; the first one's sum is kept.
                        inside = (columns < N) & (rank == 0)
                        tl.store(dbias + columns, total.to(dbias.dtype.element_ty), mask=inside)
            elif NEED_DA:
                block = (tile - db_end) % DA_BLOCKS
                part = (tile - db_end) // DA_BLOCKS
                column = block // SLABS * BLOCK_C
                rank = block % SLABS * RANKS
                end = tl.minimum(part * segment + segment, M)
                if FUSED:
                    for panel in range(part * segment // BLOCK_M, tl.cdiv(end, BLOCK_M)):
                        wait(flags + panel, 1)
                product, total = row_sums(
                    dxa, units, x, mask, stride_x, part * segment, end, column, rank, M, seed,
                    threshold, UNIT_ROWS, K, R, MASK_STRIDE, RANKS, BLOCK_C, BLOCK_S, DROPOUT, WIDE,
                    PACKED, True, False, MMA, PRECISION,
                )  # fmt: skip
                if FUSED or DRAWN:
                    for panel in range(part * segment // BLOCK_M, tl.cdiv(end, BLOCK_M)):
                        leave(flags + panel, last_out)
                slot = DB_BLOCKS + block
                space = partials + wide(slot) * parts * (RANKS + 1) * BLOCK_C
                product, total, last = sum_of_parts(
                    product, total, space, counters + slot, part, parts, RANKS, BLOCK_C, True, False
                )
                if last:
                    columns = column + tl.arange(0, BLOCK_C)
                    ranks = rank + tl.arange(0, RANKS)
                    inside = (ranks < R)[:, None] & (columns < K)[None, :]
                    pointers = da + ranks[:, None] * K + columns[None, :]
                    tl.store(pointers, product.to(da.dtype.element_ty), mask=inside)

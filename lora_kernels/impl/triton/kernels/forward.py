"""The forward kernel: y = x Wᵀ + bias + scaling · xa Bᵀ and xa = D(x) Aᵀ in one launch.

A program takes tiles of y, [BLOCK_M, BLOCK_N], until there are none. What it does for one:

1. It takes the tile's number. The lowest numbers are the xa columns: the first XA_COLUMNS columns
   of tiles, which also shrink x. The others follow.
2. It sums x Wᵀ over K, BLOCK_K columns a step. An xa column begins with its own part of K. There
   each tile of x serves a second product, D(x) Aᵀ; the sums of the part before are added to it, and
   the result is left for the part after, or stored as xa by the last one. Then comes the rest of K.
3. It waits until all parts of its row panel's xa are there, which its flag counts.
4. It expands: scaling · xa Bᵀ is added to the same sums.
5. It counts itself out of the flag, adds the bias, rounds once and stores y.

docs/kernels.md draws this, and says why no order of programs can deadlock.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels.mask import keep_where, masks_by_element, seed_of
from lora_kernels.impl.triton.kernels.split_k import by_ranks, by_threads, load_part, store_part
from lora_kernels.impl.triton.kernels.tiles import (
    block_pointers,
    grouped_tile,
    keep_scale,
    leave,
    load_factor,
    load_operand,
    opaque,
    operand_pointers,
    plus_product,
    publish,
    read,
    scaling_of,
    settled,
    store_factor,
    store_tile,
    take,
    wait,
    wide,
)


@triton.jit
def fused_tile(tile, rows, columns, XA_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Return (row, column): the xa columns of every row panel first, then the rest."""
    if XA_COLUMNS == 0:
        return grouped_tile(tile, rows, columns, GROUP)
    else:
        rest = tl.maximum(tile - rows * XA_COLUMNS, 0)
        row, column = grouped_tile(rest, rows, tl.maximum(columns - XA_COLUMNS, 1), GROUP)
        shrinks = tile < rows * XA_COLUMNS
        row = tl.where(shrinks, tile // XA_COLUMNS, row)
        return row, tl.where(shrinks, tile % XA_COLUMNS, column + XA_COLUMNS)


@triton.jit
def _plain_steps(
    acc, x_descriptor, w_descriptor, x_pointers, w_pointers, row, column, begin, end,
    K: tl.constexpr, BLOCK_K: tl.constexpr, WRAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc + x Wᵀ of the tile at (row, column), over columns of x from `begin` to `end`.

    WRAPS: whether `end` may lie beyond K, where the columns begin again at 0.
    """
    LENGTH: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    for step in tl.range(begin, end, BLOCK_K):
        k = step
        if WRAPS:
            # The right one of the two is the smaller: the other is negative, so huge, or beyond K.
            k = tl.minimum(step.to(tl.uint32), (step - LENGTH).to(tl.uint32)).to(tl.int32)
        x_tile = load_operand(x_descriptor, x_pointers, row, k, K, BLOCK_K)
        w_tile = load_operand(w_descriptor, w_pointers, column, k, K, BLOCK_K)
        acc = plus_product(acc, x_tile, w_tile.T, PRECISION)
    return acc


@triton.jit
def _shrinking_steps(
    x_descriptor, w_descriptor, x_pointers, w_pointers, row, column, begin, end, a, seed,
    threshold, stride_a, dtype: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, MMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return x Wᵀ of the tile and A D(x)ᵀ, over the same columns.

    D only drops here: the factor of kept elements comes with the complete sum.
    """
    # Copies to shared memory serve one layout of reader without bank conflicts: with two, x is
    # carried one step ahead in registers instead.
    CARRIED: tl.constexpr = DROPOUT and x_descriptor is None
    rows = row + tl.arange(0, BLOCK_M)
    near_ranks = tl.minimum(tl.arange(0, BLOCK_R), R - 1)
    a_pointers = block_pointers(a, near_ranks, stride_a, 0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DROPOUT:
        shrunk = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    else:
        shrunk = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if CARRIED:
        inside = begin + tl.arange(0, BLOCK_K) < K
        x_next = tl.load(x_pointers + begin, mask=inside[None, :], other=0.0)
    for k in tl.range(begin, end, BLOCK_K):
        if CARRIED:
            x_tile = x_next
            inside = k + BLOCK_K + tl.arange(0, BLOCK_K) < tl.minimum(end, K)
            x_next = tl.load(x_pointers + k + BLOCK_K, mask=inside[None, :], other=0.0)
        else:
            x_tile = load_operand(x_descriptor, x_pointers, row, k, K, BLOCK_K)
        w_tile = load_operand(w_descriptor, w_pointers, column, k, K, BLOCK_K)
        a_tile = load_operand(None, a_pointers, 0, k, K, BLOCK_K).to(dtype)
        acc = plus_product(acc, x_tile, w_tile.T, PRECISION)
        if DROPOUT:
            masks, _ = masks_by_element(rows, k, seed, threshold, K, BLOCK_K, WIDE, PACKED)
            if MMA == "wgmma" and not CARRIED:
                # Triton 3.8 leaves this product pending while the next copy overwrites x.
                acc = settled(acc)
            # As second operand it goes through shared memory: a register operand of an
            # asynchronous product could change while it is read.
            shrunk = plus_product(shrunk, a_tile, keep_where(masks, x_tile).T, PRECISION)
        else:
            shrunk = plus_product(shrunk, x_tile, a_tile.T, PRECISION)
    shrunk = read(shrunk, MMA)
    if DROPOUT:
        return acc, shrunk
    else:
        return acc, shrunk.T


@triton.jit
def _summed(
    shrunk, xa, high, low, flag, panel, part, M, threshold, R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, XA_COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add the sums of the part before to shrunk [BLOCK_R, BLOCK_M], this part's; leave the result.

    The last of XA_COLUMNS parts stores and returns xa of the row panel, the others return zeros.
    """
    dtype: tl.constexpr = xa.dtype.element_ty
    LOW: tl.constexpr = 4 if dtype == tl.bfloat16 else 8
    rows = panel * BLOCK_M + tl.arange(0, BLOCK_M)
    if high is not None:
        shrunk = by_threads(shrunk)
    if part > 0:
        wait(flag, part)
        if high is None:
            near_rows = tl.minimum(rows, M - 1)
            shrunk += load_factor(xa, near_rows, R, 0, R, BLOCK_R, R == BLOCK_R).T
        else:
            shrunk += load_part(high, low, panel, shrunk.shape[0], LOW)
        # All have read before any writes to the same place.
        tl.debug_barrier()
    if part < XA_COLUMNS - 1:
        if high is None:
            store_factor(xa, shrunk.T, rows, M, R, BLOCK_R)
        else:
            store_part(shrunk, high, low, panel, LOW)
        made = tl.zeros((BLOCK_M, BLOCK_R), dtype)
    else:
        if high is None:
            whole = shrunk
        else:
            whole = by_ranks(shrunk, BLOCK_R)
        if DROPOUT:
            whole *= keep_scale(threshold)
        made = whole.T.to(dtype)
        store_factor(xa, made, rows, M, R, BLOCK_R)
    publish(flag)
    return made


@triton.jit
def _producing_tile(
    x_descriptor, w_descriptor, x_pointers, w_pointers, panel, column, a, xa, high, low, flag,
    seed, threshold, M, stride_a, part, K: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, XA_COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, MMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return x Wᵀ of a tile and, if it is the last part, xa of its row panel, stored.

    A tile begins with the columns of x that it sums for xa, so that xa is complete early.
    """
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SHARE: tl.constexpr = (STEPS + XA_COLUMNS - 1) // XA_COLUMNS
    row = panel * BLOCK_M
    begin = part * SHARE * BLOCK_K
    end = begin + SHARE * BLOCK_K
    if STEPS % XA_COLUMNS != 0:
        begin = tl.minimum(begin, STEPS * BLOCK_K)
        end = tl.minimum(end, STEPS * BLOCK_K)
    acc, shrunk = _shrinking_steps(
        x_descriptor, w_descriptor, x_pointers, w_pointers, row, column, begin, end, a, seed,
        threshold, stride_a, xa.dtype.element_ty, K, R, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
        DROPOUT, WIDE, PACKED, MMA, PRECISION,
    )  # fmt: skip
    made = _summed(
        shrunk, xa, high, low, flag, panel, part, M, threshold, R, BLOCK_M, BLOCK_R, XA_COLUMNS,
        DROPOUT,
    )  # fmt: skip
    if XA_COLUMNS > 1:
        # The rest of K: from the end of this part on, and after K from 0 to its begin. A
        # part that ends at K starts at 0.
        start = tl.where(end < STEPS * BLOCK_K, end, 0)
        acc = _plain_steps(
            acc, x_descriptor, w_descriptor, x_pointers, w_pointers, row, column, start,
            start + STEPS * BLOCK_K - (end - begin), K, BLOCK_K, XA_COLUMNS > 2, PRECISION,
        )  # fmt: skip
    return acc, made


@triton.jit
def _plus_low_rank(
    acc, made, xa, b, rows, columns, stride_b, scale, R: tl.constexpr, BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr, MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc + scale · xa Bᵀ of a tile's rows and columns; made: their xa, or None to load."""
    dtype: tl.constexpr = xa.dtype.element_ty
    # scale · B could leave float16's range.
    SCALED_SUMS: tl.constexpr = dtype == tl.float16
    if SCALED_SUMS:
        # Of a smaller scale nothing is left beside it.
        scale = tl.where(tl.abs(scale) < 2.0**-80, 2.0**-80, scale)
        acc = read(acc, MMA) * (1.0 / scale)
    for rank in tl.static_range(0, BLOCK_R, RANK_STEP):
        if made is None:
            xa_tile = load_factor(xa, rows, R, rank, R, RANK_STEP, R == BLOCK_R)
        else:
            xa_tile = made
        b_tile = load_factor(b, columns, stride_b, rank, R, RANK_STEP, R == BLOCK_R)
        b_tile = b_tile.to(dtype)
        if not SCALED_SUMS:
            b_tile = (b_tile.to(tl.float32) * scale).to(dtype)
        acc = plus_product(acc, xa_tile, b_tile.T, PRECISION)
    if SCALED_SUMS:
        acc = read(acc, MMA) * scale
    return acc


@triton.jit(do_not_specialize=["M", "scaling", "threshold"])
def forward_kernel(
    x, w, a, b, bias, seed_pointer, scaling_pointer, y, xa, high, low, flags, x_descriptor,
    w_descriptor, stride_x, stride_w, stride_a, stride_b, M, scaling, threshold,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, RANK_STEP: tl.constexpr,
    GROUP: tl.constexpr, XA_COLUMNS: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr,
    PACKED: tl.constexpr, MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute y [M, N] and xa [M, R]; persistent, tiles in order.

    A tile of an xa column waits for no later tile before it has left its own sums; so XA_COLUMNS
    running programs are enough. XA_COLUMNS = 0 reads an xa made by an earlier launch.
    high, low: int32, where split-K's sums are left, `high` in xa's own memory; None where xa is
    float32 and holds them itself, or there is one part.
    x_descriptor, w_descriptor: blocks [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K], or both None.
    flags: int32, one a row panel and the ticket, zero before and after.
    """
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    panels = tl.cdiv(M, BLOCK_M)
    scale = scaling_of(scaling, scaling_pointer)
    seed = wide(0)
    if DROPOUT:
        seed = seed_of(seed_pointer)
    tiles = panels * COLUMNS
    number = 0
    while number < tiles:
        number = take(flags + panels, tiles)
        # Of one turn, or none: out of this loop nothing is hoisted, which would fill registers. No
        # stages: where K is one step Triton would pipeline it, its tiles' last operands too.
        for tile in tl.range(
            number, tl.minimum(opaque(number + 1), tiles), num_stages=1, disable_licm=True
        ):
            panel, panel_column = fused_tile(tile, panels, COLUMNS, XA_COLUMNS, GROUP)
            row = panel * BLOCK_M
            column = panel_column * BLOCK_N
            rows = row + tl.arange(0, BLOCK_M)
            columns = column + tl.arange(0, BLOCK_N)
            # Beyond the edge the last row is repeated: no mask in the loops, and it is not stored.
            near_rows = tl.minimum(rows, M - 1)
            near_columns = tl.minimum(columns, N - 1)
            x_pointers = operand_pointers(x, x_descriptor, near_rows, stride_x, 0, BLOCK_K)
            w_pointers = operand_pointers(w, w_descriptor, near_columns, stride_w, 0, BLOCK_K)
            if XA_COLUMNS > 0 and panel_column < XA_COLUMNS:
                part = panel_column
                if XA_COLUMNS == 1:
                    part = 0
                acc, made = _producing_tile(
                    x_descriptor, w_descriptor, x_pointers, w_pointers, panel, column, a, xa, high,
                    low, flags + panel, seed, threshold, M, stride_a, part, K, R, BLOCK_M, BLOCK_N,
                    BLOCK_K, BLOCK_R, XA_COLUMNS, DROPOUT, WIDE, PACKED, MMA, PRECISION,
                )  # fmt: skip
                if RANK_STEP == BLOCK_R:
                    # The last one needs no reading back of what it made.
                    if part < XA_COLUMNS - 1:
                        wait(flags + panel, XA_COLUMNS)
                        made = load_factor(xa, near_rows, R, 0, R, BLOCK_R, R == BLOCK_R)
                    acc = _plus_low_rank(
                        acc, made, xa, b, near_rows, near_columns, stride_b, scale, R, BLOCK_R,
                        RANK_STEP, MMA, PRECISION,
                    )  # fmt: skip
                else:
                    wait(flags + panel, XA_COLUMNS)
                    acc = _plus_low_rank(
                        acc, None, xa, b, near_rows, near_columns, stride_b, scale, R, BLOCK_R,
                        RANK_STEP, MMA, PRECISION,
                    )  # fmt: skip
            else:
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                acc = _plain_steps(
                    acc, x_descriptor, w_descriptor, x_pointers, w_pointers, row, column, 0, K, K,
                    BLOCK_K, False, PRECISION,
                )  # fmt: skip
                if XA_COLUMNS > 0:
                    wait(flags + panel, XA_COLUMNS)
                acc = _plus_low_rank(
                    acc, None, xa, b, near_rows, near_columns, stride_b, scale, R, BLOCK_R,
                    RANK_STEP, MMA, PRECISION,
                )  # fmt: skip
            if bias is not None:
                if N % BLOCK_N == 0:
                    bias_row = tl.load(bias + columns)
                else:
                    bias_row = tl.load(bias + columns, mask=columns < N, other=0.0)
            acc = read(acc, MMA)
            if XA_COLUMNS > 0:
                leave(flags + panel, XA_COLUMNS + COLUMNS - 1)
            if bias is not None:
                acc += bias_row.to(tl.float32)[None, :]
            store_tile(y, acc, rows, columns, M, N, N % BLOCK_N == 0)

"""The forward kernel: y = x Wᵀ + bias + scaling · xa Bᵀ and xa = D(x) Aᵀ in one launch."""

import triton
import triton.language as tl

from lora_kernels._triton.philox import drawn_words, keep_where, masks_by_words, seed_of
from lora_kernels._triton.tiles import (
    INTERPRETED,
    block_pointers,
    grouped_tile,
    keep_scale,
    leave,
    load_factor,
    load_operand,
    operand_pointers,
    plus_product,
    publish,
    read,
    scaling_of,
    settled,
    store_factor,
    store_tile,
    wait,
)


@triton.jit
def fused_tile(tile, rows, columns, PRODUCERS: tl.constexpr, GROUP: tl.constexpr):
    """Return (row, column): the producing columns of every row panel first, then the rest."""
    if PRODUCERS == 0:
        return grouped_tile(tile, rows, columns, GROUP)
    else:
        rest = tl.maximum(tile - rows * PRODUCERS, 0)
        row, column = grouped_tile(rest, rows, tl.maximum(columns - PRODUCERS, 1), GROUP)
        producing = tile < rows * PRODUCERS
        row = tl.where(producing, tile // PRODUCERS, row)
        return row, tl.where(producing, tile % PRODUCERS, column + PRODUCERS)


@triton.jit
def either(condition, first, second):
    """Return the first tile if the scalar condition holds, else the second."""
    if INTERPRETED or first.dtype.primitive_bitwidth != 16:
        return tl.where(condition, first, second)
    else:
        # Two elements a register; element by element LLVM takes registers apart.
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $3, $1, $2, 0xca;",
            "=r,r,r,r,r",
            [first, second, -(condition.to(tl.int32))],
            first.dtype,
            is_pure=True,
            pack=2,
        )


@triton.jit
def row_slice(tile, part, PARTS: tl.constexpr):
    """Return the part-th of PARTS equal groups of rows: a choice between registers."""
    if PARTS > 1:
        HALF: tl.constexpr = tile.shape[0] // 2
        low, high = tile.reshape(2, HALF, tile.shape[1]).permute(1, 2, 0).split()
        half = either(part >= PARTS // 2, high, low)
        return row_slice(half, part % (PARTS // 2), PARTS // 2)
    else:
        return tile


@triton.jit
def draw_words(
    mask, flags, draws, share, seed, threshold, M, K: tl.constexpr, MASK_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, PRODUCERS: tl.constexpr, DRAWN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Leave the bits of D in `mask`, `share` steps of DRAWN columns of a row panel at a time.

    All programs draw as much before they wait for anything: a producing tile that drew all of its
    rows would take several times as long as others, which wait for it.
    """
    STEPS: tl.constexpr = (K + DRAWN - 1) // DRAWN
    WORDS: tl.constexpr = BLOCK_M // 4
    QUARTER: tl.constexpr = WORDS // PRODUCERS
    word = tl.arange(0, WORDS)
    for draw in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * draws, tl.num_programs(0)):
        panel = draw // draws
        first = draw % draws * share
        rows = panel * BLOCK_M + word // QUARTER * (4 * QUARTER) + word % QUARTER
        pointers = block_pointers(mask, panel * WORDS + word, MASK_STRIDE, 0, DRAWN // 8)
        for step in range(first, tl.minimum(first + share, STEPS)):
            words = drawn_words(rows, QUARTER, step * DRAWN, seed, threshold, K, DRAWN, WIDE)
            tl.store(pointers + step * (DRAWN // 8), words.to(tl.int32, bitcast=True))
        publish(flags + panel)


@triton.jit
def _plain_tile(
    x_descriptor, w_descriptor, x_pointers, w_pointers, row, column, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return x Wᵀ of the tile at (row, column), float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        x_tile = load_operand(x_descriptor, x_pointers, row, k, K, BLOCK_K)
        w_tile = load_operand(w_descriptor, w_pointers, column, k, K, BLOCK_K)
        acc = plus_product(acc, x_tile, w_tile.T, PRECISION)
    return acc


@triton.jit
def _producing_tile(
    x_descriptor, w_descriptor, x_pointers, w_pointers, row, column, a, xa, mask, flag, threshold,
    M, stride_a, part, K: tl.constexpr, R: tl.constexpr, MASK_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRODUCERS: tl.constexpr, MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return x Wᵀ of a tile and xa of part of its rows, made on the way and published.

    mask: the bits of D, or None; part: which of PRODUCERS equal parts.
    """
    ROWS: tl.constexpr = BLOCK_M // PRODUCERS
    # The thin product takes x from registers: for dropout, or for some of the rows only.
    BY_REGISTERS: tl.constexpr = mask is not None or PRODUCERS > 1
    # Copies to shared memory serve one layout of reader without bank conflicts: with two, x is
    # carried one step ahead in registers instead.
    CARRIED: tl.constexpr = BY_REGISTERS and x_descriptor is None
    dtype: tl.constexpr = xa.dtype.element_ty
    rows = row + part * ROWS + tl.arange(0, ROWS)
    near_ranks = tl.minimum(tl.arange(0, BLOCK_R), R - 1)
    a_pointers = block_pointers(a, near_ranks, stride_a, 0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BY_REGISTERS:
        thin = tl.zeros((BLOCK_R, ROWS), tl.float32)
    else:
        thin = tl.zeros((ROWS, BLOCK_R), tl.float32)
    if CARRIED:
        x_next = load_operand(x_descriptor, x_pointers, row, 0, K, BLOCK_K)
    if mask is not None:
        quarter = (row + part * ROWS) // 4 + tl.arange(0, ROWS // 4)
        words = block_pointers(mask, quarter, MASK_STRIDE, 0, BLOCK_K // 8)
        bits_next = tl.load(words)
    for k in tl.range(0, K, BLOCK_K):
        if CARRIED:
            x_tile = x_next
            inside = k + BLOCK_K + tl.arange(0, BLOCK_K) < K
            x_next = tl.load(x_pointers + k + BLOCK_K, mask=inside[None, :], other=0.0)
        else:
            x_tile = load_operand(x_descriptor, x_pointers, row, k, K, BLOCK_K)
        w_tile = load_operand(w_descriptor, w_pointers, column, k, K, BLOCK_K)
        a_tile = load_operand(None, a_pointers, 0, k, K, BLOCK_K).to(dtype)
        if mask is not None:
            # A step ahead: the pipeline would take them through shared memory.
            bits = bits_next
            words += BLOCK_K // 8
            bits_next = tl.load(words, mask=k + BLOCK_K < K)
        acc = plus_product(acc, x_tile, w_tile.T, PRECISION)
        if BY_REGISTERS:
            if MMA == "wgmma" and not CARRIED:
                # Triton 3.8 leaves this product pending while the next copy overwrites x.
                acc = settled(acc)
            part_tile = row_slice(x_tile, part, PRODUCERS)
            if mask is not None:
                part_tile = keep_where(masks_by_words(bits.to(tl.uint32, bitcast=True)), part_tile)
            # As second operand it goes through shared memory: a register operand of an
            # asynchronous product could change while it is read.
            thin = plus_product(thin, a_tile, part_tile.T, PRECISION)
        else:
            thin = plus_product(thin, x_tile, a_tile.T, PRECISION)
    thin = read(thin, MMA)
    if BY_REGISTERS:
        thin = thin.T
    if mask is not None:
        thin *= keep_scale(threshold)
    made = thin.to(dtype)
    store_factor(xa, made, rows, M, R, BLOCK_R)
    publish(flag)
    return acc, made


@triton.jit
def _plus_low_rank(
    acc, made, xa, b, rows, columns, stride_b, scale, R: tl.constexpr, BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc + scale · xa Bᵀ of a tile's rows and columns; made: their xa, or None to load."""
    dtype: tl.constexpr = xa.dtype.element_ty
    for rank in tl.static_range(0, BLOCK_R, RANK_STEP):
        if made is None:
            xa_tile = load_factor(xa, rows, R, rank, R, RANK_STEP, R == BLOCK_R)
        else:
            xa_tile = made
        b_tile = load_factor(b, columns, stride_b, rank, R, RANK_STEP, R == BLOCK_R)
        b_tile = (b_tile.to(dtype).to(tl.float32) * scale).to(dtype)
        acc = plus_product(acc, xa_tile, b_tile.T, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "scaling", "threshold", "share"])
def forward_kernel(
    x, w, a, b, bias, seed_pointer, scaling_pointer, y, xa, mask, flags, x_descriptor, w_descriptor,
    stride_x, stride_w, stride_a, stride_b, share, M, scaling, threshold,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, MASK_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr, GROUP: tl.constexpr, PRODUCERS: tl.constexpr, DRAWN: tl.constexpr,
    WIDE: tl.constexpr, MMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute y [M, N] and xa [M, R]; persistent, tiles in order.

    Programs draw the mask first; tiles of the first PRODUCERS columns come next and wait for
    nothing else before they publish, so no tile waits for one that can't run. PRODUCERS = 0 reads
    an xa made by an earlier launch.
    mask: int32 [panels · BLOCK_M / 4, MASK_STRIDE], a word for eight columns of four rows; None
    without dropout or producers. share: steps of DRAWN columns that are drawn at a time.
    x_descriptor, w_descriptor: blocks [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K], or both None.
    flags: int32, one a row panel, zero before and after.
    """
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    panels = tl.cdiv(M, BLOCK_M)
    scale = scaling_of(scaling, scaling_pointer)
    draws = 0
    if mask is not None:
        draws = tl.cdiv((K + DRAWN - 1) // DRAWN, share)
        seed = seed_of(seed_pointer)
        draw_words(
            mask, flags, draws, share, seed, threshold, M, K, MASK_STRIDE, BLOCK_M, PRODUCERS,
            DRAWN, WIDE,
        )  # fmt: skip
    for tile in tl.range(tl.program_id(0), panels * COLUMNS, tl.num_programs(0), disable_licm=True):
        panel, panel_column = fused_tile(tile, panels, COLUMNS, PRODUCERS, GROUP)
        row = panel * BLOCK_M
        column = panel_column * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        # Beyond the edge the last row is repeated: no mask in the loops, and it is not stored.
        near_rows = tl.minimum(rows, M - 1)
        near_columns = tl.minimum(columns, N - 1)
        x_pointers = operand_pointers(x, x_descriptor, near_rows, stride_x, 0, BLOCK_K)
        w_pointers = operand_pointers(w, w_descriptor, near_columns, stride_w, 0, BLOCK_K)
        if PRODUCERS > 0 and panel_column < PRODUCERS:
            if mask is not None:
                wait(flags + panel, draws)
            acc, made = _producing_tile(
                x_descriptor, w_descriptor, x_pointers, w_pointers, row, column, a, xa, mask,
                flags + panel, threshold, M, stride_a, panel_column, K, R, MASK_STRIDE, BLOCK_M,
                BLOCK_N, BLOCK_K, BLOCK_R, PRODUCERS, MMA, PRECISION,
            )  # fmt: skip
            # All of its xa, in one piece, needs no reading back.
            if PRODUCERS == 1 and RANK_STEP == BLOCK_R:
                acc = _plus_low_rank(
                    acc, made, xa, b, near_rows, near_columns, stride_b, scale, R, BLOCK_R,
                    RANK_STEP, PRECISION,
                )  # fmt: skip
            else:
                wait(flags + panel, draws + PRODUCERS)
                acc = _plus_low_rank(
                    acc, None, xa, b, near_rows, near_columns, stride_b, scale, R, BLOCK_R,
                    RANK_STEP, PRECISION,
                )  # fmt: skip
        else:
            acc = _plain_tile(
                x_descriptor, w_descriptor, x_pointers, w_pointers, row, column, K, BLOCK_M,
                BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            if PRODUCERS > 0:
                wait(flags + panel, draws + PRODUCERS)
            acc = _plus_low_rank(
                acc, None, xa, b, near_rows, near_columns, stride_b, scale, R, BLOCK_R,
                RANK_STEP, PRECISION,
            )  # fmt: skip
        if bias is not None:
            if N % BLOCK_N == 0:
                bias_row = tl.load(bias + columns)
            else:
                bias_row = tl.load(bias + columns, mask=columns < N, other=0.0)
        acc = read(acc, MMA)
        if PRODUCERS > 0:
            leave(flags + panel, draws + PRODUCERS + COLUMNS - 1)
        if bias is not None:
            acc += bias_row.to(tl.float32)[None, :]
        store_tile(y, acc, rows, columns, M, N, N % BLOCK_N == 0)

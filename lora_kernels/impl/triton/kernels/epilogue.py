"""Device functions: what follows the main loop of a tile: the expand, bias, g, and D of dx."""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels.mask import (
    choose,
    keep_where,
    masks_by_bits,
    masks_by_call,
)
from lora_kernels.impl.triton.kernels.memory import (
    block_pointers,
    load_b,
    load_factor,
    store_tile,
)
from lora_kernels.impl.triton.kernels.products import plus_product, read, rounded_now, zeros
from lora_kernels.impl.triton.kernels.units import inverse_of
from lora_kernels.operands import dora

SUMS_APART = tl.constexpr(dora.SUMS_APART)


@triton.jit
def expanded(acc, made, xa, b, rows, columns, scale, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Return acc + scale · xa Bᵀ of a tile's rows and columns; made: their xa, or None to load."""
    R: tl.constexpr = SHAPE.R
    BLOCK_R: tl.constexpr = SHAPE.BLOCK_R
    RANK_STEP: tl.constexpr = SHAPE.RANK_STEP
    EVEN: tl.constexpr = R == BLOCK_R
    dtype: tl.constexpr = xa.dtype.element_ty
    # scale · B could leave float16's range.
    SCALED_SUMS: tl.constexpr = dtype == tl.float16
    if SCALED_SUMS:
        # Of a smaller scale nothing is left beside it.
        scale = tl.where(tl.abs(scale) < 2.0**-80, 2.0**-80, scale)
        acc = read(acc, MODE) * (1.0 / scale)
    for rank in tl.static_range(0, BLOCK_R, RANK_STEP):
        if made is None:
            xa_tile = load_factor(xa, rows, R, rank, R, RANK_STEP, EVEN=EVEN)
        else:
            xa_tile = made
        b_tile = load_b(b, columns, rank, R, RANK_STEP, EVEN=EVEN)
        b_tile = b_tile.to(dtype)
        if not SCALED_SUMS:
            b_tile = (b_tile.to(tl.float32) * scale).to(dtype)
        acc = plus_product(acc, xa_tile, b_tile.T, MODE)
    if SCALED_SUMS:
        acc = read(acc, MODE) * scale
    return acc


@triton.jit
def load_bias(bias, columns, SHAPE: tl.constexpr):
    """Load the bias of a tile's columns."""
    if SHAPE.N % SHAPE.BLOCK_N == 0:
        return tl.load(bias + columns)
    else:
        return tl.load(bias + columns, mask=columns < SHAPE.N, other=0.0)


@triton.jit
def load_gain(gain, columns, N: tl.constexpr, BLOCK: tl.constexpr):
    """Load g of BLOCK columns of y, float32, from a `Gain`; as `gain_of` has it."""
    dtype: tl.constexpr = gain.magnitude.dtype.element_ty
    NEAR: tl.constexpr = 2.0 ** -(dtype.fp_mantissa_width + 1) + SUMS_APART * 2.0**-23
    inside = columns < N
    if N % BLOCK == 0:
        magnitude = tl.load(gain.magnitude + columns)
        norm = tl.load(gain.norm + columns)
    else:
        magnitude = tl.load(gain.magnitude + columns, mask=inside, other=1.0)
        norm = tl.load(gain.norm + columns, mask=inside, other=1.0)
    ratio = tl.div_rn(magnitude.to(tl.float32), norm)
    return tl.where(tl.abs(1.0 - ratio) <= NEAR, 1.0, ratio)


@triton.jit
def finish_dx(acc, dxa, a, dx, draw, drawn, at, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Add D(dxa A) to dy W, where dxa holds the factor of kept elements, and store dx.

    drawn: whether tiles of dA have left D's bits in draw's `mask`; float32 has none.
    """
    dtype: tl.constexpr = dx.dtype.element_ty
    K: tl.constexpr = SHAPE.K
    R: tl.constexpr = SHAPE.R
    BLOCK_K: tl.constexpr = SHAPE.BLOCK_K
    BLOCK_R: tl.constexpr = SHAPE.BLOCK_R
    RANK_STEP: tl.constexpr = SHAPE.RANK_STEP
    EVEN: tl.constexpr = R == BLOCK_R
    rows = at.row + tl.arange(0, SHAPE.BLOCK_M)
    columns = at.column + tl.arange(0, BLOCK_K)
    near_rows = tl.minimum(rows, at.m - 1)
    if MODE.DROPOUT:
        if dtype == tl.float32:
            # Its product's operands lie in registers: there is room for the mask only afterwards.
            dropped = acc
            acc = zeros(SHAPE.BLOCK_M, BLOCK_K)
        else:
            if draw.mask is not None and drawn:
                pointers = block_pointers(
                    draw.mask, near_rows, SHAPE.MASK_STRIDE, at.column // 32, BLOCK_K // 32
                )
                masks = masks_by_bits(tl.load(pointers).to(tl.uint32, bitcast=True))
            else:
                masks = masks_by_call(at.drawn, at.column, draw, K, BLOCK_K, MODE)
            dropped = rounded_now(acc, dtype)
    if dxa.units is not None:
        # In dx nothing counts that float16 itself doesn't hold: a small unit goes to dxa, a large
        # one, the largest of the tile, to A.
        if SHAPE.UNIT_ROWS % SHAPE.BLOCK_M == 0:
            unit = tl.load(dxa.units + at.row // SHAPE.UNIT_ROWS)
            above = tl.maximum(unit, 1.0)
            below = unit * inverse_of(above)
        else:
            unit = tl.load(dxa.units + near_rows // SHAPE.UNIT_ROWS)
            above = tl.maximum(tl.max(unit, 0), 1.0)
            below = (unit * inverse_of(above))[:, None]
    for rank in tl.static_range(0, BLOCK_R, RANK_STEP):
        dxa_tile = load_factor(dxa.numbers, near_rows, R, rank, R, RANK_STEP, EVEN=EVEN)
        ranks = rank + tl.arange(0, RANK_STEP)
        a_pointers = block_pointers(a.pointer, ranks, a.stride, at.column, BLOCK_K)
        if EVEN and K % BLOCK_K == 0:
            a_tile = tl.load(a_pointers)
        else:
            inside = (ranks < R)[:, None] & (columns < K)[None, :]
            a_tile = tl.load(a_pointers, mask=inside, other=0.0)
        if dxa.units is not None:
            dxa_tile = (dxa_tile.to(tl.float32) * below).to(dtype)
            a_tile = a_tile.to(tl.float32) * above
        acc = plus_product(acc, dxa_tile, a_tile.to(dxa_tile.dtype), MODE)
    result = read(acc, MODE).to(dtype)
    if MODE.DROPOUT:
        if dtype == tl.float32:
            masks = masks_by_call(at.drawn, at.column, draw, K, BLOCK_K, MODE)
            result = dropped + keep_where(masks, result)
        else:
            result = choose(masks, result, dropped)
    store_tile(dx, result, rows, columns, at.m, K, EVEN=K % BLOCK_K == 0)

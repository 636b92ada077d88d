"""The pass over x of the library plan: dA = dxaᵀ D(x) and dx = D(dxa A), to which dy W is added.

A program takes BLOCK_C columns of x and dx over the rows of a segment, BLOCK_S a step. In each it

1. draws D, of which both products have their part;
2. adds dxaᵀ D(x) to its sums, which have all ranks;
3. stores D(dxa A), rounded; with BASE D of the sum with what dx holds.

Then it leaves its sums of dA; the last segment to arrive at a block of dA adds all of them in
order. Nothing waits. dxa carries the factor of kept elements.

float16's dxa is float32 here: a step's numbers are rounded in a unit of their own, `unit_of`, so
that they neither vanish nor overflow.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.mask import (
    keep_where,
    masks_by_call,
    masks_by_element,
)
from lora_kernels.impl.triton.kernels.memory import block_pointers, wide
from lora_kernels.impl.triton.kernels.products import plus_product, read, zeros
from lora_kernels.impl.triton.kernels.sums import store_da, sum_of_parts
from lora_kernels.impl.triton.kernels.units import inverse_of, unit_of


@triton.jit(do_not_specialize=["m", "threshold", "segment"])
def x_pass_kernel(
    x, dxa, a, seed_pointer, out, shared, m, threshold, segment, SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Compute what is not None of dx and da; x, a: `Rows`, dxa [M, R] contiguous.

    segment: rows that one program sums, a multiple of BLOCK_S.
    """
    K: tl.constexpr = SHAPE.K
    R: tl.constexpr = SHAPE.R
    RANKS: tl.constexpr = SHAPE.RANKS
    BLOCK_C: tl.constexpr = SHAPE.BLOCK_C
    BLOCK_S: tl.constexpr = SHAPE.BLOCK_S
    BLOCKS: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    NEED_DX: tl.constexpr = out.dx is not None
    NEED_DA: tl.constexpr = out.da is not None
    stored: tl.constexpr = out.dx.dtype if NEED_DX else x.pointer.dtype
    dtype: tl.constexpr = stored.element_ty
    UNITS: tl.constexpr = dxa.dtype.element_ty != dtype
    block = tl.program_id(0) % BLOCKS
    part = tl.program_id(0) // BLOCKS
    column = block * BLOCK_C
    columns = column + tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, RANKS)
    steps = tl.arange(0, BLOCK_S)
    within = (columns < K)[None, :]
    near = tl.minimum(steps, m - 1)
    seed = wide(0)
    if MODE.DROPOUT:
        seed = tl.load(seed_pointer)
    draw = arguments.Draw(seed, threshold, None)
    dxa_pointers = dxa + near.to(tl.int64)[:, None] * R + ranks[None, :]
    if NEED_DA:
        x_pointers = block_pointers(x.pointer, near, x.stride, column, BLOCK_C)
    if NEED_DX:
        dx_pointers = block_pointers(out.dx, steps, K, column, BLOCK_C)
        a_pointers = block_pointers(a.pointer, ranks, a.stride, column, BLOCK_C)
        a_tile = tl.load(a_pointers, mask=(ranks < R)[:, None] & within, other=0.0).to(dtype)
    product = zeros(RANKS, BLOCK_C)
    end = tl.minimum(part * segment + segment, m)
    latest = tl.maximum(m - BLOCK_S, 0)
    for first in tl.range(part * segment, end, BLOCK_S):
        # The last step starts early enough to stay inside; rows that it meets again count nothing.
        start = tl.minimum(first, latest)
        rows = start + steps
        inside = ((rows >= first) & (rows < m))[:, None]
        known = inside
        if R != RANKS:
            known &= (ranks < R)[None, :]
        factor = tl.load(dxa_pointers + wide(start) * R, mask=known, other=0.0)
        if UNITS:
            unit = unit_of(factor)
            factor = (factor * inverse_of(unit)).to(dtype)
        if NEED_DA:
            x_tile = tl.load(x_pointers + wide(start) * x.stride, mask=within, other=0.0)
            if MODE.DROPOUT:
                masks, _ = masks_by_element(rows, column, draw, K, BLOCK_C, MODE)
                x_tile = keep_where(masks, x_tile)
            if UNITS:
                made = plus_product(zeros(RANKS, BLOCK_C), factor.T, x_tile, MODE)
                product += read(made, MODE) * unit
            else:
                product = plus_product(product, factor.T, x_tile, MODE)
        if NEED_DX:
            result = read(plus_product(zeros(BLOCK_S, BLOCK_C), factor, a_tile, MODE), MODE)
            if UNITS:
                result *= unit
            if SHAPE.BASE:
                held = tl.load(dx_pointers + wide(start) * K, mask=inside & within, other=0.0)
                result += held.to(tl.float32)
            result = result.to(dtype)
            if MODE.DROPOUT:
                # A product lies otherwise than a loaded tile; the compiler joins the Philox calls.
                masks = masks_by_call(rows, column, draw, K, BLOCK_C, MODE)
                result = keep_where(masks, result)
            tl.store(dx_pointers + wide(start) * K, result, mask=inside & within)
    if NEED_DA:
        parts = tl.cdiv(m, segment)
        space = shared.partials + wide(block) * parts * (RANKS + 1) * BLOCK_C
        total = tl.zeros((BLOCK_C,), tl.float32)
        product, total, last = sum_of_parts(
            read(product, MODE), total, space, shared.counters + block, part, parts, SHAPE,
            PRODUCT=True, TOTAL=False,
        )  # fmt: skip
        if last:
            store_da(out.da, product, column, 0, SHAPE)

"""Passes over y and dy that multiply by DoRA's gain, g = magnitude / norm.

    rescale    y = g ⊙ u + bias, or with dropout y = z + (g - 1) ⊙ u + bias where y holds z
    dz pass    dz = g ⊙ dy, with dropout also dw = (g - 1) ⊙ dy; dmagnitude and dbias

A program of the dz pass takes BLOCK_C columns of dy over the rows of a segment, BLOCK_S a step, and
leaves its sums; the last segment to arrive at a block adds all of them in order. Nothing waits.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels.epilogue import load_bias, load_gain
from lora_kernels.impl.triton.kernels.mask import keep_scale
from lora_kernels.impl.triton.kernels.memory import block_pointers, store_tile, wide
from lora_kernels.impl.triton.kernels.products import zeros
from lora_kernels.impl.triton.kernels.sums import sum_of_parts


@triton.jit(do_not_specialize=["m"])
def rescale_kernel(u, gain, bias, y, m, SHAPE: tl.constexpr, BASE: tl.constexpr):
    """Compute y [M, N] of a contiguous u [M, N]; bias may be None.

    BASE: whether y holds z, to which (g - 1) ⊙ u is added.
    """
    N: tl.constexpr = SHAPE.N
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    rows = tile // COLUMNS * SHAPE.BLOCK_M + tl.arange(0, SHAPE.BLOCK_M)
    column = tile % COLUMNS * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    inside = (rows < m)[:, None]
    if N % BLOCK_N != 0:
        inside &= (columns < N)[None, :]
    g = load_gain(gain, columns, N, BLOCK_N)[None, :]
    total = tl.load(block_pointers(u, rows, N, column, BLOCK_N), mask=inside).to(tl.float32)
    if BASE:
        z = tl.load(block_pointers(y, rows, N, column, BLOCK_N), mask=inside).to(tl.float32)
        total = total * (g - 1.0) + z
    else:
        total *= g
    if bias is not None:
        total += load_bias(bias, columns, SHAPE).to(tl.float32)[None, :]
    store_tile(y, total, rows, columns, m, N, EVEN=N % BLOCK_N == 0)


@triton.jit(do_not_specialize=["m", "threshold", "segment"])
def dz_pass_kernel(dy, u, gain, out, shared, m, threshold, segment, SHAPE: tl.constexpr):
    """Compute what is not None of `DzOutputs`; dy, u: `Rows` [M, N], u for dm only.

    dw carries the factor of kept elements. segment: rows that one program sums, a multiple of
    BLOCK_S.
    """
    N: tl.constexpr = SHAPE.N
    BLOCK_C: tl.constexpr = SHAPE.BLOCK_C
    BLOCK_S: tl.constexpr = SHAPE.BLOCK_S
    BLOCKS: tl.constexpr = (N + BLOCK_C - 1) // BLOCK_C
    NEED_DM: tl.constexpr = out.dm is not None
    NEED_DBIAS: tl.constexpr = out.dbias is not None
    block = tl.program_id(0) % BLOCKS
    part = tl.program_id(0) // BLOCKS
    column = block * BLOCK_C
    columns = column + tl.arange(0, BLOCK_C)
    g = load_gain(gain, columns, N, BLOCK_C)[None, :]
    end = tl.minimum(part * segment + segment, m)
    products = zeros(1, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in tl.range(part * segment, end, BLOCK_S):
        rows = first + tl.arange(0, BLOCK_S)
        inside = (rows < end)[:, None] & (columns < N)[None, :]
        pointers = block_pointers(dy.pointer, rows, dy.stride, column, BLOCK_C)
        tile = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        if out.dz is not None:
            tl.store(
                block_pointers(out.dz, rows, N, column, BLOCK_C),
                (tile * g).to(out.dz.dtype.element_ty), mask=inside,
            )  # fmt: skip
        if out.dw is not None:
            tl.store(
                block_pointers(out.dw, rows, N, column, BLOCK_C),
                (tile * ((g - 1.0) * keep_scale(threshold))).to(out.dw.dtype.element_ty),
                mask=inside,
            )  # fmt: skip
        if NEED_DM:
            u_pointers = block_pointers(u.pointer, rows, u.stride, column, BLOCK_C)
            u_tile = tl.load(u_pointers, mask=inside, other=0.0).to(tl.float32)
            products += tl.sum(tile * u_tile, 0)[None, :]
        if NEED_DBIAS:
            total += tl.sum(tile, 0)
    if NEED_DM or NEED_DBIAS:
        parts = tl.cdiv(m, segment)
        space = shared.partials + wide(block) * parts * 2 * BLOCK_C
        products, total, last = sum_of_parts(
            products, total, space, shared.counters + block, part, parts, SHAPE,
            PRODUCT=NEED_DM, TOTAL=NEED_DBIAS,
        )  # fmt: skip
        if last:
            store_column_sums(out, gain, products, total, columns, SHAPE)


@triton.jit
def store_column_sums(out, gain, products, total, columns, SHAPE: tl.constexpr):
    """Store dmagnitude, of Σ dy ⊙ u [1, BLOCK_C], and dbias of their columns, where wanted."""
    inside = columns < SHAPE.N
    if out.dm is not None:
        norm = tl.load(gain.norm + columns, mask=inside, other=1.0)
        dm = tl.div_rn(tl.sum(products, 0), norm)
        tl.store(out.dm + columns, dm.to(out.dm.dtype.element_ty), mask=inside)
    if out.dbias is not None:
        tl.store(out.dbias + columns, total.to(out.dbias.dtype.element_ty), mask=inside)

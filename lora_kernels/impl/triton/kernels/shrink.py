"""The shrink kernel: xa = D(x) Aᵀ, or dxa = scaling · dy B, where they have a launch of their own.

A program takes row panels, as many apart as there are programs. A row panel is BLOCK_M rows of v,
which is x or dy. What it does for one:

1. It sums v f over v's columns, BLOCK_L a step; with dropout it draws D of each tile of x first.
2. It multiplies the sums by scaling and by the factor of kept elements.
3. It stores them, those of float16's dxa in a unit of the row panel, which it stores too.

Nothing waits: the forward or backward kernel reads the result in the next launch.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels.mask import keep_where, masks_by_element
from lora_kernels.impl.triton.kernels.tiles import (
    block_pointers,
    inverse_of,
    keep_scale,
    plus_product,
    read,
    scaling_of,
    store_factor,
    unit_of,
)


@triton.jit(do_not_specialize=["M", "scaling", "threshold"])
def shrink_kernel(
    v, f, seed_pointer, scaling_pointer, out, units,
    stride_v, stride_f, M, scaling, threshold,
    L: tl.constexpr, R: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, MMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute out [M, R] = scaling · D(v) f for v [M, L] and f [L, R], fᵀ if TRANSPOSED.

    units: where the unit of each BLOCK_M rows of out goes (`unit_of`), float32; None: 1.
    """
    dtype: tl.constexpr = v.dtype.element_ty
    ranks = tl.arange(0, BLOCK_R)
    steps = tl.arange(0, BLOCK_L)
    scale = scaling_of(scaling, scaling_pointer) * keep_scale(threshold)
    if DROPOUT:
        seed = tl.load(seed_pointer)
    else:
        seed = 0
    for panel in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = panel * BLOCK_M + tl.arange(0, BLOCK_M)
        v_pointers = block_pointers(v, tl.minimum(rows, M - 1), stride_v, 0, BLOCK_L)
        acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        for first in tl.range(0, L, BLOCK_L):
            inside = first + steps < L
            v_tile = tl.load(v_pointers + first, mask=inside[None, :], other=0.0)
            if TRANSPOSED:
                pointers = block_pointers(f, ranks, stride_f, first, BLOCK_L)
            else:
                pointers = f + (first + steps).to(tl.int64)[None, :] * stride_f + ranks[:, None]
            f_tile = tl.load(pointers, mask=inside[None, :] & (ranks < R)[:, None], other=0.0)
            if DROPOUT:
                masks, _ = masks_by_element(rows, first, seed, threshold, L, BLOCK_L, WIDE, PACKED)
                v_tile = keep_where(masks, v_tile)
            acc = plus_product(acc, f_tile.to(dtype), v_tile.T, PRECISION)
        sums = read(acc, MMA).T * scale
        if units is not None:
            unit = unit_of(sums)
            tl.store(units + panel, unit)
            sums *= inverse_of(unit)
        store_factor(out, sums, rows, M, R, BLOCK_R)

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

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.mask import keep_scale, keep_where, masks_by_element
from lora_kernels.impl.triton.kernels.memory import block_pointers, scaling_of, store_factor
from lora_kernels.impl.triton.kernels.products import plus_product, read, zeros
from lora_kernels.impl.triton.kernels.units import inverse_of, unit_of


@triton.jit
def shrink_panel(
    v, f, out, kept, panel, draw, scale, m, SHAPE: tl.constexpr, MODE: tl.constexpr
):  # fmt: skip
    """Store scale · D(v) f of a row panel, fᵀ if TRANSPOSED; see `shrink_kernel`."""
    dtype: tl.constexpr = v.pointer.dtype.element_ty
    L: tl.constexpr = SHAPE.L
    BLOCK_L: tl.constexpr = SHAPE.BLOCK_L
    ranks = tl.arange(0, SHAPE.BLOCK_R)
    steps = tl.arange(0, BLOCK_L)
    rows = panel * SHAPE.BLOCK_M + tl.arange(0, SHAPE.BLOCK_M)
    v_pointers = block_pointers(v.pointer, tl.minimum(rows, m - 1), v.stride, 0, BLOCK_L)
    acc = zeros(SHAPE.BLOCK_R, SHAPE.BLOCK_M)
    for first in tl.range(0, L, BLOCK_L):
        inside = first + steps < L
        v_tile = tl.load(v_pointers + first, mask=inside[None, :], other=0.0)
        if SHAPE.TRANSPOSED:
            pointers = block_pointers(f.pointer, ranks, f.stride, first, BLOCK_L)
        else:
            columns = (first + steps).to(tl.int64)[None, :]
            pointers = f.pointer + columns * f.stride + ranks[:, None]
        f_inside = inside[None, :] & (ranks < SHAPE.R)[:, None]
        f_tile = tl.load(pointers, mask=f_inside, other=0.0)
        if MODE.DROPOUT:
            masks, _ = masks_by_element(rows, first, draw, L, BLOCK_L, MODE)
            v_tile = keep_where(masks, v_tile)
            if kept is not None:
                tl.store(
                    block_pointers(kept, rows, L, first, BLOCK_L),
                    (v_tile.to(tl.float32) * keep_scale(draw.threshold)).to(dtype),
                    mask=(rows < m)[:, None] & inside[None, :],
                )
        acc = plus_product(acc, f_tile.to(dtype), v_tile.T, MODE)
    sums = read(acc, MODE).T * scale
    if out.units is not None:
        unit = unit_of(sums)
        tl.store(out.units + panel, unit)
        sums *= inverse_of(unit)
    store_factor(out.numbers, sums, rows, m, SHAPE.R, SHAPE.BLOCK_R)


@triton.jit(do_not_specialize=["m", "scaling", "threshold"])
def shrink_kernel(
    v, f, seed_pointer, scaling_pointer, out, kept, m, scaling, threshold, SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Compute out [M, R] = scaling · D(v) f for v [M, L] and f [L, R], fᵀ if TRANSPOSED.

    v, f: `Rows`; out: a `Factor`. Where it has units, one goes there for each BLOCK_M rows.
    kept: contiguous [M, L], takes D(v), which is drawn; or None.
    """
    scale = scaling_of(scaling, scaling_pointer) * keep_scale(threshold)
    if MODE.DROPOUT:
        seed = tl.load(seed_pointer)
    else:
        seed = 0
    draw = arguments.Draw(seed, threshold, None)
    for panel in tl.range(tl.program_id(0), tl.cdiv(m, SHAPE.BLOCK_M), tl.num_programs(0)):
        shrink_panel(v, f, out, kept, panel, draw, scale, m, SHAPE, MODE)

"""The backward kernel of groups: dx, dA, dB and dbias of sorted rows in one launch.

    dx = dy W + D(dxa A)      dA = dxaᵀ D(x)      dB = scaling · dyᵀ xa      dxa = scaling · dy B

The kinds of tiles are those of the backward kernel, in its order: the first column of dx, which
makes dxa and publishes it by its row panel's flag; then the sums over rows, of dB, dbias and dA, of
which those of dA wait for the flags of their groups' panels; then the other columns of dx. A sum
takes all rows of an adapter or weight, so none is split. A tile finds its group from the offsets,
as forward's does. Rows of dx are sorted: those that read one row of x are added by another launch.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.epilogue import finish_dx
from lora_kernels.impl.triton.kernels.flags import leave, publish, wait
from lora_kernels.impl.triton.kernels.grouped_sums import sum_da, sum_db, sum_dbias
from lora_kernels.impl.triton.kernels.groups import (
    first_panels,
    located,
    matrix_of,
    named_rows,
    number_of,
    scaling_for,
)
from lora_kernels.impl.triton.kernels.mainloop import dy_products
from lora_kernels.impl.triton.kernels.mask import keep_scale
from lora_kernels.impl.triton.kernels.memory import (
    block_pointers,
    store_factor,
    store_tile,
    wide,
)
from lora_kernels.impl.triton.kernels.order import dx_tile, take
from lora_kernels.impl.triton.kernels.products import opaque, read, zeros
from lora_kernels.impl.triton.kernels.units import eleven_bits


@triton.jit
def _store_dxa(dxa, shrunk, dy, rows, end, SHAPE: tl.constexpr):
    """Store dxa, rounded to the precision of dy's dtype."""
    if dxa.dtype.element_ty != dy.pointer.dtype.element_ty:
        shrunk = eleven_bits(shrunk)
    store_factor(dxa, shrunk, rows, end, SHAPE.R, SHAPE.BLOCK_R)


@triton.jit(do_not_specialize=["count", "tokens", "scaling", "threshold"])
def grouped_backward_kernel(
    dy, x, xa, call, groups, dxa, out, flags, count, tokens, scaling, threshold,
    SHAPE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute what is not None of `out`: dx [count, K], da, db, dbias; persistent, tiles in order.

    Tiles wait for earlier ones alone, so that one running program is enough.
    dxa: [count, R], float32 beside float16. flags: as forward's.
    """
    N: tl.constexpr = SHAPE.N
    K: tl.constexpr = SHAPE.K
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_K: tl.constexpr = SHAPE.BLOCK_K
    NEED_DX: tl.constexpr = out.dx is not None
    NEED_DA: tl.constexpr = out.da is not None
    NEED_DB: tl.constexpr = out.db is not None
    NEED_DBIAS: tl.constexpr = out.dbias is not None
    FUSED: tl.constexpr = NEED_DX or NEED_DA
    COLUMNS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EVEN: tl.constexpr = K % BLOCK_K == 0
    SLABS: tl.constexpr = SHAPE.BLOCK_R // SHAPE.RANKS
    N_BLOCKS: tl.constexpr = (N + SHAPE.BLOCK_C - 1) // SHAPE.BLOCK_C
    DA_BLOCKS: tl.constexpr = (K + SHAPE.BLOCK_C - 1) // SHAPE.BLOCK_C * SLABS
    # What the last tile to leave a row panel finds: a publish, and the other tiles' leaves.
    LAST_OUT: tl.constexpr = COLUMNS * NEED_DX + DA_BLOCKS * NEED_DA
    firsts = first_panels(groups.offsets, count, SHAPE)
    panels = count // BLOCK_M + SHAPE.GROUPS + 1
    dxa_end = panels * FUSED
    db_end = dxa_end + SHAPE.ADAPTERS * N_BLOCKS * SLABS * NEED_DB
    dbias_end = db_end + SHAPE.WEIGHTS * N_BLOCKS * NEED_DBIAS
    da_end = dbias_end + SHAPE.ADAPTERS * DA_BLOCKS * NEED_DA
    tiles = da_end + panels * (COLUMNS - 1) * NEED_DX
    seed = wide(0)
    if MODE.DROPOUT:
        seed = tl.load(call.seed)
    draw = arguments.Draw(seed, threshold, None)
    number = 0
    while number < tiles:
        number = take(flags + panels, tiles)
        # Of one turn, or none: out of this loop nothing is hoisted, which would fill registers.
        for tile in tl.range(number, tl.minimum(opaque(number + 1), tiles), disable_licm=True):
            if tile < dxa_end or tile >= da_end:
                if FUSED:
                    panel, panel_column = dx_tile(
                        tile, panels, dxa_end, da_end, COLUMNS, 1, SHAPE.GROUP
                    )
                    group, row, end = located(firsts, groups.offsets, panel, count, SHAPE)
                    rows = row + tl.arange(0, BLOCK_M)
                    column = panel_column * BLOCK_K
                    columns = column + tl.arange(0, BLOCK_K)
                    if row < end:
                        if group == SHAPE.GROUPS:
                            if NEED_DX:
                                empty = zeros(BLOCK_M, BLOCK_K)
                                store_tile(out.dx, empty, rows, columns, end, K, EVEN=EVEN)
                        else:
                            adapter = number_of(groups.adapters, group, -1, SHAPE.ADAPTERS)
                            weight = number_of(groups.weights, group, 0, SHAPE.WEIGHTS)
                            w, a = matrix_of(call.w, weight), matrix_of(call.a, adapter)
                            own = arguments.Call(
                                w, a, matrix_of(call.b, adapter), None, None, None, None
                            )
                            source = named_rows(groups.scatter, tl.minimum(rows, end - 1), count)
                            pointers = block_pointers(
                                dy.pointer, source, dy.stride, 0, SHAPE.BLOCK_N
                            )
                            side = arguments.Side(None, pointers, row)
                            if (tile < dxa_end) & (adapter >= 0):
                                acc, shrunk = dy_products(
                                    side, own, None, column, SHAPE, MODE, BASE=NEED_DX, SHRINK=True
                                )
                                scale = scaling_for(scaling, call.scaling, adapter)
                                # dxa carries the factor of kept elements.
                                shrunk = read(shrunk, MODE) * (scale * keep_scale(threshold))
                                _store_dxa(dxa, shrunk, dy, rows, end, SHAPE)
                                publish(flags + panel)
                            else:
                                acc, _ = dy_products(
                                    side, own, None, column, SHAPE, MODE, BASE=NEED_DX, SHRINK=False
                                )
                            if NEED_DX:
                                if adapter >= 0:
                                    wait(flags + panel, 1)
                                    at = arguments.Place(row, column, end, source)
                                    finish_dx(
                                        acc, arguments.Factor(dxa, None), a, out.dx, draw,
                                        drawn=False, at=at, SHAPE=SHAPE, MODE=MODE,
                                    )  # fmt: skip
                                    leave(flags + panel, LAST_OUT)
                                else:
                                    acc = read(acc, MODE)
                                    store_tile(out.dx, acc, rows, columns, end, K, EVEN=EVEN)
            elif NEED_DB and tile < db_end:
                sum_db(
                    xa, dy, out.db, groups, scaling, call.scaling, tile - dxa_end, count, SHAPE,
                    MODE,
                )  # fmt: skip
            elif NEED_DBIAS and tile < dbias_end:
                sum_dbias(dy, out.dbias, groups, tile - db_end, count, SHAPE)
            elif NEED_DA:
                sum_da(
                    dxa, x, out.da, groups, draw, flags, (tile - dbias_end, count, tokens), SHAPE,
                    MODE, LAST_OUT,
                )  # fmt: skip

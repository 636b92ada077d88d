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

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.epilogue import finish_dx
from lora_kernels.impl.triton.kernels.flags import leave, publish, wait
from lora_kernels.impl.triton.kernels.mainloop import dy_products
from lora_kernels.impl.triton.kernels.mask import keep_scale
from lora_kernels.impl.triton.kernels.memory import (
    operand_pointers,
    scaling_of,
    store_factor,
    wide,
)
from lora_kernels.impl.triton.kernels.order import dx_tile, take
from lora_kernels.impl.triton.kernels.products import opaque, read
from lora_kernels.impl.triton.kernels.sums import (
    row_sums,
    store_da,
    sum_dy,
    sum_of_parts,
)
from lora_kernels.impl.triton.kernels.units import inverse_of, unit_of


@triton.jit(do_not_specialize=["m", "scaling", "threshold", "segment"])
def backward_kernel(
    dy, dy_descriptor, x, xa, call, w_descriptor, dxa, out, shared, m, scaling, threshold, segment,
    SHAPE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients asked for; persistent, tiles in order.

    With FUSED the first tiles make dxa, a `Factor`; otherwise an earlier launch has. Tiles wait for
    earlier ones alone, so that one running program is enough.
    dy_descriptor, w_descriptor: blocks [BLOCK_M, BLOCK_N] and [BLOCK_N, BLOCK_K], or both None.
    segment: rows a tile of dA or dB sums, a multiple of BLOCK_M.
    """
    N: tl.constexpr = SHAPE.N
    K: tl.constexpr = SHAPE.K
    R: tl.constexpr = SHAPE.R
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_C: tl.constexpr = SHAPE.BLOCK_C
    RANKS: tl.constexpr = SHAPE.RANKS
    FUSED: tl.constexpr = SHAPE.FUSED
    NEED_DX: tl.constexpr = out.dx is not None
    NEED_DA: tl.constexpr = out.da is not None
    NEED_DB: tl.constexpr = out.db is not None
    NEED_DBIAS: tl.constexpr = out.dbias is not None
    DY_SUMS: tl.constexpr = NEED_DB or NEED_DBIAS
    COLUMNS: tl.constexpr = (K + SHAPE.BLOCK_K - 1) // SHAPE.BLOCK_K
    SLABS: tl.constexpr = SHAPE.BLOCK_R // RANKS
    DB_BLOCKS: tl.constexpr = (N + BLOCK_C - 1) // BLOCK_C * SLABS
    DA_BLOCKS: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C * SLABS
    panels = tl.cdiv(m, BLOCK_M)
    parts = tl.cdiv(m, segment)
    dxa_end = panels * FUSED
    db_end = dxa_end + DB_BLOCKS * parts * DY_SUMS
    da_end = db_end + DA_BLOCKS * parts * NEED_DA
    tiles = da_end + panels * (COLUMNS - FUSED) * NEED_DX
    DRAWN: tl.constexpr = shared.mask is not None
    # What the flag counts when a later tile of dx may go on: dxa is published, and where tiles of
    # dA draw D, the tile that made dxa has left, and so have these.
    before: tl.constexpr = 2 * FUSED + DA_BLOCKS if DRAWN else 1
    # What the last tile to leave a row panel finds: a publish, and the other tiles' leaves.
    last_out = FUSED + COLUMNS * NEED_DX + DA_BLOCKS * NEED_DA - 1
    flags = shared.flags
    scale = scaling_of(scaling, call.scaling)
    # dxa carries the factor of kept elements, so that neither dx nor dA is multiplied by it.
    shrink_scale = scale * keep_scale(threshold)
    seed = wide(0)
    if MODE.DROPOUT:
        seed = tl.load(call.seed)
    draw = arguments.Draw(seed, threshold, shared.mask)
    number = 0
    while number < tiles:
        number = take(flags + panels, tiles)
        # Of one turn, or none: out of this loop nothing is hoisted, which would fill registers.
        for tile in tl.range(number, tl.minimum(opaque(number + 1), tiles), disable_licm=True):
            if tile < dxa_end or tile >= da_end:
                panel, panel_column = dx_tile(
                    tile, panels, dxa_end, da_end, COLUMNS, FUSED, SHAPE.GROUP
                )
                row = panel * BLOCK_M
                column = panel_column * SHAPE.BLOCK_K
                rows = row + tl.arange(0, BLOCK_M)
                near_rows = tl.minimum(rows, m - 1)
                dy_pointers = operand_pointers(dy, dy_descriptor, near_rows, 0, SHAPE.BLOCK_N)
                dy_side = arguments.Side(dy_descriptor, dy_pointers, row)
                if FUSED and tile < dxa_end:
                    acc, shrunk = dy_products(
                        dy_side, call, w_descriptor, column, SHAPE, MODE, BASE=NEED_DX, SHRINK=True
                    )
                    shrunk = read(shrunk, MODE) * shrink_scale
                    if dxa.units is not None:
                        unit = unit_of(shrunk)
                        tl.store(dxa.units + panel, unit)
                        shrunk *= inverse_of(unit)
                    store_factor(dxa.numbers, shrunk, rows, m, R, SHAPE.BLOCK_R)
                    publish(flags + panel)
                else:
                    acc, _ = dy_products(
                        dy_side, call, w_descriptor, column, SHAPE, MODE, BASE=NEED_DX, SHRINK=False
                    )
                if NEED_DX:
                    if FUSED or DRAWN:
                        wait(flags + panel, tl.where(tile < dxa_end, 1, before))
                    finish_dx(
                        acc, dxa, call.a, out.dx, draw, tile >= dxa_end,
                        arguments.Place(row, column, m, rows), SHAPE, MODE,
                    )  # fmt: skip
                    if FUSED or DRAWN:
                        leave(flags + panel, last_out)
            elif DY_SUMS and tile < db_end:
                sum_dy(xa, dy, out, shared, tile - dxa_end, segment, m, scale, SHAPE, MODE)
            elif NEED_DA:
                block = (tile - db_end) % DA_BLOCKS
                part = (tile - db_end) // DA_BLOCKS
                column = block // SLABS * BLOCK_C
                rank = block % SLABS * RANKS
                end = tl.minimum(part * segment + segment, m)
                if FUSED:
                    for panel in range(part * segment // BLOCK_M, tl.cdiv(end, BLOCK_M)):
                        wait(flags + panel, 1)
                product, total = row_sums(
                    dxa, x, draw, arguments.Segment(part * segment, end, m, column, rank, K),
                    SHAPE, MODE, DROPOUT=MODE.DROPOUT, PRODUCT=True, TOTAL=False,
                )  # fmt: skip
                if FUSED or DRAWN:
                    for panel in range(part * segment // BLOCK_M, tl.cdiv(end, BLOCK_M)):
                        leave(flags + panel, last_out)
                slot = DB_BLOCKS + block
                space = shared.partials + wide(slot) * parts * (RANKS + 1) * BLOCK_C
                product, total, last = sum_of_parts(
                    product, total, space, shared.counters + slot, part, parts, SHAPE,
                    PRODUCT=True, TOTAL=False,
                )  # fmt: skip
                if last:
                    store_da(out.da, product, column, rank, SHAPE)

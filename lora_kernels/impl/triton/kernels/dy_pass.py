"""The pass over dy of the library plan: dxa = scaling · dy B, dB = scaling · dyᵀ xa and dbias.

Rows are taken in segments. Tiles of two kinds belong to one, and their programs follow each other:

1. dxa. A tile is a row panel of the segment, over all of N.
2. dB and dbias. A tile sums dyᵀ xa, and dy itself, over the segment's rows. The last segment to
   arrive at a block of dB adds all of them in order.

So both kinds read the same rows of dy at nearly the same time, once from memory and once from L2.
Nothing waits. dxa carries the factor of kept elements, so that neither dx nor dA is multiplied by
it.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.mask import keep_scale
from lora_kernels.impl.triton.kernels.memory import scaling_of
from lora_kernels.impl.triton.kernels.shrink import shrink_panel
from lora_kernels.impl.triton.kernels.sums import sum_dy


@triton.jit(do_not_specialize=["m", "scaling", "threshold", "segment"])
def dy_pass_kernel(
    dy, xa, b, scaling_pointer, dxa, out, shared, m, scaling, threshold, segment,
    SHRINK: tl.constexpr, SHAPE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute what is not None of dxa (a `Factor`), db and dbias; dy, b: `Rows`.

    segment: rows of one, a multiple of SHRINK's BLOCK_M and of BLOCK_S.
    """
    BLOCK_C: tl.constexpr = SHAPE.BLOCK_C
    RANKS: tl.constexpr = SHAPE.RANKS
    NEED_DB: tl.constexpr = out.db is not None
    NEED_DBIAS: tl.constexpr = out.dbias is not None
    SLABS: tl.constexpr = SHAPE.BLOCK_R // RANKS
    DB_BLOCKS: tl.constexpr = (SHAPE.N + BLOCK_C - 1) // BLOCK_C * SLABS
    panels = 0
    if dxa.numbers is not None:
        panels = segment // SHRINK.BLOCK_M
    tiles = panels
    if NEED_DB or NEED_DBIAS:
        tiles += DB_BLOCKS
    part = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    scale = scaling_of(scaling, scaling_pointer)
    draw = arguments.Draw(0, threshold, None)
    if tile < panels:
        if dxa.numbers is not None:
            panel = part * panels + tile
            if panel * SHRINK.BLOCK_M < m:
                shrink_scale = scale * keep_scale(threshold)
                shrink_panel(dy, b, dxa, None, panel, draw, shrink_scale, m, SHRINK, MODE)
    elif NEED_DB or NEED_DBIAS:
        number = part * DB_BLOCKS + tile - panels
        sum_dy(xa, dy, out, shared, number, segment, m, scale, SHAPE, MODE)

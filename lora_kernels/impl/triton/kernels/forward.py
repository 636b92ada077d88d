"""The forward kernel: y = x Wᵀ + bias + scaling · xa Bᵀ and xa = D(x) Aᵀ in one launch.

A program takes tiles of y, [BLOCK_M, BLOCK_N], until there are none. Of DoRA the lowest numbers are
tiles of the norm, rows of W, which wait for nothing. What a program does for a tile of y:

1. It takes the tile's number. The lowest numbers are the xa columns: the first XA_COLUMNS columns
   of tiles, which also shrink x. The others follow.
2. It sums x Wᵀ over K, BLOCK_K columns a step. An xa column begins with its own part of K. There
   each tile of x serves a second product, D(x) Aᵀ; the sums of the part before are added to it, and
   the result is left for the part after, or stored as xa by the last one. Then comes the rest of K.
3. It waits until all parts of its row panel's xa are there, which its flag counts.
4. It expands: scaling · xa Bᵀ is added to the same sums.
5. It counts itself out of the flag, adds the bias, rounds once and stores y; of DoRA it stores the
   sums as u, waits until all norms are there, and multiplies by g before the bias.

docs/kernels.md draws this, and says why no order of programs can deadlock.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.epilogue import expanded, load_bias, load_gain
from lora_kernels.impl.triton.kernels.flags import leave, publish, wait
from lora_kernels.impl.triton.kernels.mainloop import plain_steps, shrinking_steps
from lora_kernels.impl.triton.kernels.mask import keep_scale, seed_of
from lora_kernels.impl.triton.kernels.memory import (
    load_factor,
    operand_pointers,
    scaling_of,
    store_factor,
    store_tile,
    wide,
)
from lora_kernels.impl.triton.kernels.norm import store_norms
from lora_kernels.impl.triton.kernels.order import fused_tile, take
from lora_kernels.impl.triton.kernels.products import opaque, read, zeros
from lora_kernels.impl.triton.kernels.split_k import by_ranks, by_threads, load_part, store_part
from lora_kernels.impl.triton.kernels.weights import weight_rows


@triton.jit
def _summed(shrunk, out, part, m, threshold, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Add the sums of the part before to shrunk [BLOCK_R, BLOCK_M], this part's; leave the result.

    The last of XA_COLUMNS parts stores and returns xa of the row panel, the others return zeros.
    """
    R: tl.constexpr = SHAPE.R
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_R: tl.constexpr = SHAPE.BLOCK_R
    dtype: tl.constexpr = out.xa.dtype.element_ty
    LOW: tl.constexpr = 4 if dtype == tl.bfloat16 else 8
    rows = part.panel * BLOCK_M + tl.arange(0, BLOCK_M)
    if out.high is not None:
        shrunk = by_threads(shrunk)
    if part.index > 0:
        wait(part.flag, part.index)
        if out.high is None:
            near_rows = tl.minimum(rows, m - 1)
            shrunk += load_factor(out.xa, near_rows, R, 0, R, BLOCK_R, EVEN=R == BLOCK_R).T
        else:
            shrunk += load_part(out.high, out.low, part.panel, shrunk.shape[0], LOW)
        # All have read before any writes to the same place.
        tl.debug_barrier()
    if part.index < SHAPE.XA_COLUMNS - 1:
        if out.high is None:
            store_factor(out.xa, shrunk.T, rows, m, R, BLOCK_R)
        else:
            store_part(shrunk, out.high, out.low, part.panel, LOW)
        made = tl.zeros((BLOCK_M, BLOCK_R), dtype)
    else:
        if out.high is None:
            whole = shrunk
        else:
            whole = by_ranks(shrunk, BLOCK_R)
        if MODE.DROPOUT:
            whole *= keep_scale(threshold)
        made = whole.T.to(dtype)
        store_factor(out.xa, made, rows, m, R, BLOCK_R)
    publish(part.flag)
    return made


@triton.jit
def _producing_tile(x, w, a, out, part, draw, m, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Return x Wᵀ of a tile and, if it is the last part, xa of its row panel, stored.

    A tile begins with the columns of x that it sums for xa, so that xa is complete early.
    """
    STEPS: tl.constexpr = (SHAPE.K + SHAPE.BLOCK_K - 1) // SHAPE.BLOCK_K
    SHARE: tl.constexpr = (STEPS + SHAPE.XA_COLUMNS - 1) // SHAPE.XA_COLUMNS
    LENGTH: tl.constexpr = STEPS * SHAPE.BLOCK_K
    begin = part.index * SHARE * SHAPE.BLOCK_K
    end = begin + SHARE * SHAPE.BLOCK_K
    if STEPS % SHAPE.XA_COLUMNS != 0:
        begin = tl.minimum(begin, LENGTH)
        end = tl.minimum(end, LENGTH)
    acc, shrunk = shrinking_steps(x, w, a, draw, begin, end, SHAPE, MODE)
    made = _summed(shrunk, out, part, m, draw.threshold, SHAPE, MODE)
    if SHAPE.XA_COLUMNS > 1:
        # The rest of K: from the end of this part on, and after K from 0 to its begin. A
        # part that ends at K starts at 0.
        start = tl.where(end < LENGTH, end, 0)
        stop = start + LENGTH - (end - begin)
        acc = plain_steps(acc, x, w, start, stop, SHAPE, MODE, WRAPS=SHAPE.XA_COLUMNS > 2)
    return acc, made


@triton.jit(do_not_specialize=["m", "scaling", "threshold"])
def forward_kernel(
    x, x_descriptor, call, w_descriptor, out, flags, m, scaling, threshold, SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Compute y [M, N] and xa [M, R], `Outputs`; persistent, tiles in order.

    A tile of an xa column waits for no later tile before it has left its own sums; so XA_COLUMNS
    running programs are enough. XA_COLUMNS = 0 reads an xa made by an earlier launch.
    x_descriptor, w_descriptor: blocks [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K], or both None.
    flags: int32, one a row panel, the ticket, and with NORM_ROWS the norms'; zero before and after.
    """
    N: tl.constexpr = SHAPE.N
    NORM_ROWS: tl.constexpr = SHAPE.NORM_ROWS
    NORMS: tl.constexpr = (N + NORM_ROWS - 1) // NORM_ROWS if NORM_ROWS > 0 else 0
    XA_COLUMNS: tl.constexpr = SHAPE.XA_COLUMNS
    COLUMNS: tl.constexpr = (N + SHAPE.BLOCK_N - 1) // SHAPE.BLOCK_N
    panels = tl.cdiv(m, SHAPE.BLOCK_M)
    scale = scaling_of(scaling, call.scaling)
    seed = wide(0)
    if MODE.DROPOUT:
        seed = seed_of(call.seed)
    draw = arguments.Draw(seed, threshold, None)
    tiles = panels * COLUMNS
    norms_flag = flags + panels + 1
    number = 0
    while number < NORMS + tiles:
        number = take(flags + panels, NORMS + tiles)
        first = number
        if NORMS > 0:
            first = tl.maximum(number - NORMS, 0)
            for tile in tl.range(
                number, tl.minimum(opaque(number + 1), NORMS), num_stages=1, disable_licm=True
            ):
                store_norms(call.w, call.a, call.b, call.gain.norm, tile, scale, SHAPE, MODE)
                publish(norms_flag)
        # Of one turn, or none: out of this loop nothing is hoisted, which would fill registers. No
        # stages: where K is one step Triton would pipeline it, its tiles' last operands too.
        for tile in tl.range(
            first, tl.minimum(opaque(number + 1 - NORMS), tiles), num_stages=1, disable_licm=True
        ):
            panel, panel_column = fused_tile(tile, panels, COLUMNS, XA_COLUMNS, SHAPE.GROUP)
            row = panel * SHAPE.BLOCK_M
            column = panel_column * SHAPE.BLOCK_N
            rows = row + tl.arange(0, SHAPE.BLOCK_M)
            columns = column + tl.arange(0, SHAPE.BLOCK_N)
            # Beyond the edge the last row is repeated: no mask in the loops, and it is not stored.
            near_rows = tl.minimum(rows, m - 1)
            near_columns = tl.minimum(columns, N - 1)
            x_pointers = operand_pointers(x, x_descriptor, near_rows, 0, SHAPE.BLOCK_K)
            x_side = arguments.Side(x_descriptor, x_pointers, row)
            w_pointers = weight_rows(call.w, w_descriptor, near_columns, column, SHAPE)
            w_side = arguments.Side(w_descriptor, w_pointers, column)
            if XA_COLUMNS > 0 and panel_column < XA_COLUMNS:
                part = panel_column
                if XA_COLUMNS == 1:
                    part = 0
                acc, made = _producing_tile(
                    x_side, w_side, call.a, out, arguments.Part(panel, part, flags + panel), draw,
                    m, SHAPE, MODE,
                )  # fmt: skip
                if SHAPE.RANK_STEP == SHAPE.BLOCK_R:
                    # The last one needs no reading back of what it made.
                    if part < XA_COLUMNS - 1:
                        wait(flags + panel, XA_COLUMNS)
                        made = load_factor(
                            out.xa, near_rows, SHAPE.R, 0, SHAPE.R, SHAPE.BLOCK_R,
                            EVEN=SHAPE.R == SHAPE.BLOCK_R,
                        )  # fmt: skip
                    acc = expanded(
                        acc, made, out.xa, call.b, near_rows, near_columns, scale, SHAPE, MODE
                    )
                else:
                    wait(flags + panel, XA_COLUMNS)
                    acc = expanded(
                        acc, None, out.xa, call.b, near_rows, near_columns, scale, SHAPE, MODE
                    )
            else:
                acc = zeros(SHAPE.BLOCK_M, SHAPE.BLOCK_N)
                acc = plain_steps(acc, x_side, w_side, 0, SHAPE.K, SHAPE, MODE, WRAPS=False)
                if XA_COLUMNS > 0:
                    wait(flags + panel, XA_COLUMNS)
                acc = expanded(
                    acc, None, out.xa, call.b, near_rows, near_columns, scale, SHAPE, MODE
                )
            if call.bias is not None:
                bias_row = load_bias(call.bias, columns, SHAPE)
            acc = read(acc, MODE)
            if XA_COLUMNS > 0:
                leave(flags + panel, XA_COLUMNS + COLUMNS - 1)
            if call.gain is not None:
                store_tile(out.u, acc, rows, columns, m, N, EVEN=N % SHAPE.BLOCK_N == 0)
                if NORMS > 0:
                    wait(norms_flag, NORMS)
                gain = load_gain(call.gain, columns, N, SHAPE.BLOCK_N)
                acc *= gain[None, :]
                if NORMS > 0:
                    leave(norms_flag, NORMS + tiles - 1)
            if call.bias is not None:
                acc += bias_row.to(tl.float32)[None, :]
            store_tile(out.y, acc, rows, columns, m, N, EVEN=N % SHAPE.BLOCK_N == 0)

"""The forward kernel of groups: the forward kernel's tiles, each of the rows of one group.

A tile finds its group from the offsets (`groups`), so that neither the host nor an earlier launch
has to know how many rows a group has. Rows of x are gathered as they are loaded, those of y
scattered as they are stored. Everything else is the forward kernel with one xa column: the first
column of tiles, whose numbers come first, also shrinks x, and the others wait for its row panel's
flag. A row panel whose group has no adapter has no flag; one without a group is filled with zeros.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.epilogue import expanded, load_bias
from lora_kernels.impl.triton.kernels.flags import leave, publish, wait
from lora_kernels.impl.triton.kernels.groups import (
    first_panels,
    located,
    matrix_of,
    named_rows,
    number_of,
    places,
    scaling_for,
)
from lora_kernels.impl.triton.kernels.mainloop import plain_steps, shrinking_steps
from lora_kernels.impl.triton.kernels.mask import keep_scale, seed_of
from lora_kernels.impl.triton.kernels.memory import (
    block_pointers,
    store_factor,
    store_tile,
    wide,
)
from lora_kernels.impl.triton.kernels.order import fused_tile, take
from lora_kernels.impl.triton.kernels.products import opaque, read, zeros
from lora_kernels.impl.triton.kernels.units import eleven_bits
from lora_kernels.impl.triton.kernels.weights import weight_rows


@triton.jit
def _shrinking_tile(x, w, a, xa, draw, rows, end, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Return x Wᵀ of a tile, and xa of its rows, stored."""
    acc, shrunk = shrinking_steps(x, w, a, draw, 0, SHAPE.K, SHAPE, MODE)
    if MODE.DROPOUT:
        shrunk *= keep_scale(draw.threshold)
    made = shrunk.T
    if xa.dtype.element_ty != x.pointers.dtype.element_ty:
        made = eleven_bits(made)
    made = made.to(xa.dtype.element_ty)
    store_factor(xa, made, rows, end, SHAPE.R, SHAPE.BLOCK_R)
    return acc, made


@triton.jit(do_not_specialize=["count", "tokens", "scaling", "threshold"])
def grouped_forward_kernel(
    x, call, groups, out, flags, count, tokens, scaling, threshold, SHAPE: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Compute y [count, N] and xa [count, R], `Outputs`, of x [tokens, K]; persistent.

    groups: offsets, rows, scatter, adapters and weights as in `operands.grouped.Groups`.
    flags: int32, one a row panel and the ticket, zero before and after.
    """
    N: tl.constexpr = SHAPE.N
    R: tl.constexpr = SHAPE.R
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_R: tl.constexpr = SHAPE.BLOCK_R
    COLUMNS: tl.constexpr = (N + SHAPE.BLOCK_N - 1) // SHAPE.BLOCK_N
    EVEN: tl.constexpr = N % SHAPE.BLOCK_N == 0
    firsts = first_panels(groups.offsets, count, SHAPE)
    panels = count // BLOCK_M + SHAPE.GROUPS + 1
    seed = wide(0)
    if MODE.DROPOUT:
        seed = seed_of(call.seed)
    draw = arguments.Draw(seed, threshold, None)
    tiles = panels * COLUMNS
    number = 0
    while number < tiles:
        number = take(flags + panels, tiles)
        # Of one turn, or none: out of this loop nothing is hoisted, which would fill registers.
        for tile in tl.range(
            number, tl.minimum(opaque(number + 1), tiles), num_stages=1, disable_licm=True
        ):
            panel, panel_column = fused_tile(tile, panels, COLUMNS, 1, SHAPE.GROUP)
            group, row, end = located(firsts, groups.offsets, panel, count, SHAPE)
            rows = row + tl.arange(0, BLOCK_M)
            column = panel_column * SHAPE.BLOCK_N
            columns = column + tl.arange(0, SHAPE.BLOCK_N)
            if row < end:
                to = places(groups.scatter, rows, end, count)
                if group == SHAPE.GROUPS:
                    store_tile(
                        out.y, zeros(BLOCK_M, SHAPE.BLOCK_N), to, columns, count, N, EVEN=EVEN
                    )
                    if panel_column == 0:
                        store_factor(out.xa, zeros(BLOCK_M, BLOCK_R), rows, end, R, BLOCK_R)
                else:
                    adapter = number_of(groups.adapters, group, -1, SHAPE.ADAPTERS)
                    weight = number_of(groups.weights, group, 0, SHAPE.WEIGHTS)
                    scale = scaling_for(scaling, call.scaling, adapter)
                    b = matrix_of(call.b, adapter)
                    near_rows = tl.minimum(rows, end - 1)
                    near_columns = tl.minimum(columns, N - 1)
                    source = named_rows(groups.rows, near_rows, tokens)
                    pointers = block_pointers(x.pointer, source, x.stride, 0, SHAPE.BLOCK_K)
                    x_side = arguments.Side(None, pointers, to - tl.arange(0, BLOCK_M))
                    pointers = weight_rows(
                        matrix_of(call.w, weight), None, near_columns, column, SHAPE
                    )
                    w_side = arguments.Side(None, pointers, column)
                    if (panel_column == 0) & (adapter >= 0):
                        acc, made = _shrinking_tile(
                            x_side, w_side, matrix_of(call.a, adapter), out.xa, draw, rows, end,
                            SHAPE, MODE,
                        )  # fmt: skip
                        publish(flags + panel)
                        if SHAPE.RANK_STEP == BLOCK_R:
                            acc = expanded(
                                acc, made, out.xa, b, near_rows, near_columns, scale, SHAPE, MODE
                            )
                        else:
                            wait(flags + panel, 1)
                            acc = expanded(
                                acc, None, out.xa, b, near_rows, near_columns, scale, SHAPE, MODE
                            )
                    else:
                        acc = zeros(BLOCK_M, SHAPE.BLOCK_N)
                        acc = plain_steps(acc, x_side, w_side, 0, SHAPE.K, SHAPE, MODE, WRAPS=False)
                        if adapter >= 0:
                            wait(flags + panel, 1)
                            acc = expanded(
                                acc, None, out.xa, b, near_rows, near_columns, scale, SHAPE, MODE
                            )
                        elif panel_column == 0:
                            store_factor(out.xa, zeros(BLOCK_M, BLOCK_R), rows, end, R, BLOCK_R)
                    if adapter >= 0:
                        leave(flags + panel, COLUMNS)
                    acc = read(acc, MODE)
                    if call.bias is not None:
                        bias = call.bias.pointer + wide(weight) * call.bias.stride
                        acc += load_bias(bias, columns, SHAPE).to(tl.float32)[None, :]
                    store_tile(out.y, acc, to, columns, count, N, EVEN=EVEN)

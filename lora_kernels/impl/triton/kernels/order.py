"""Device functions: which tile a program takes next, and where it lies."""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments


@triton.jit
def take(ticket, tiles):
    """Return the number of this program's next tile; from `tiles` on there is none.

    Numbers go out in order, each to a program that runs. So a tile that waits for lower ones alone
    waits for programs that run, however few do. The ticket is zero before and after a launch: who
    takes the last number, one that no tile has, wraps it.
    """
    last = tiles + tl.num_programs(0) - 1
    if arguments.INTERPRETED:
        number = tl.atomic_add(ticket, 1, sem="relaxed")
        if number == last:
            tl.atomic_xchg(ticket, 0, sem="relaxed")
        return number
    else:
        # With Triton's own atomic ptxas takes 70 registers more, 255, and spills. What Triton lays
        # out in shared memory comes after the slot, and has to begin at a multiple of 1 KB.
        return tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 thread, taken;
            .shared .align 1024 .b32 slot[256];
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first atom.relaxed.gpu.global.inc.u32 taken, [$1], $2;
            bar.sync 0;
            @first st.shared.b32 [slot], taken;
            bar.sync 0;
            ld.shared.b32 $0, [slot];
            }""",
            "=r,l,r",
            [ticket, last],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def grouped_tile(index, rows, columns, GROUP: tl.constexpr):
    """Return (row, column) of the index-th tile, GROUP rows at a time: operands stay in L2."""
    in_group = GROUP * columns
    first = index // in_group * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + index % in_group % height, index % in_group // height


@triton.jit
def fused_tile(tile, rows, columns, XA_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Return (row, column): the xa columns of every row panel first, then the rest."""
    if XA_COLUMNS == 0:
        return grouped_tile(tile, rows, columns, GROUP)
    else:
        rest = tl.maximum(tile - rows * XA_COLUMNS, 0)
        row, column = grouped_tile(rest, rows, tl.maximum(columns - XA_COLUMNS, 1), GROUP)
        shrinks = tile < rows * XA_COLUMNS
        row = tl.where(shrinks, tile // XA_COLUMNS, row)
        return row, tl.where(shrinks, tile % XA_COLUMNS, column + XA_COLUMNS)


@triton.jit
def dx_tile(
    tile, panels, dxa_end, da_end, COLUMNS: tl.constexpr, FUSED: tl.constexpr, GROUP: tl.constexpr
):
    """Return (row panel, column) of a tile of dx: before `dxa_end` column 0, which makes dxa."""
    REST: tl.constexpr = COLUMNS - FUSED if COLUMNS > FUSED else 1
    panel, column = grouped_tile(tl.maximum(tile - da_end, 0), panels, REST, GROUP)
    first = tile < dxa_end
    return tl.where(first, tile, panel), tl.where(first, 0, column + FUSED)

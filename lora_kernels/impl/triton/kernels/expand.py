"""The expand kernel of the library plan: y = bias + scaling · xa Bᵀ, to which the GEMM adds x Wᵀ.

A program makes one tile of y, [BLOCK_M, BLOCK_N]: a product over R, the bias, one rounding. Reading
y again where the GEMM stores it costs less than adding to y in a pass of its own.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels.epilogue import expanded, load_bias
from lora_kernels.impl.triton.kernels.memory import scaling_of, store_tile
from lora_kernels.impl.triton.kernels.products import read, zeros


@triton.jit(do_not_specialize=["m", "scaling"])
def expand_kernel(
    xa, b, bias, scaling_pointer, y, u, m, scaling, SHAPE: tl.constexpr, MODE: tl.constexpr
):
    """Compute y [M, N] of a contiguous xa [M, R] and the `Rows` b; bias may be None.

    u: takes the same without the bias, or None.
    """
    N: tl.constexpr = SHAPE.N
    COLUMNS: tl.constexpr = (N + SHAPE.BLOCK_N - 1) // SHAPE.BLOCK_N
    tile = tl.program_id(0)
    rows = tile // COLUMNS * SHAPE.BLOCK_M + tl.arange(0, SHAPE.BLOCK_M)
    columns = tile % COLUMNS * SHAPE.BLOCK_N + tl.arange(0, SHAPE.BLOCK_N)
    # Beyond the edge the last row is repeated, and not stored.
    near_rows, near_columns = tl.minimum(rows, m - 1), tl.minimum(columns, N - 1)
    scale = scaling_of(scaling, scaling_pointer)
    acc = zeros(SHAPE.BLOCK_M, SHAPE.BLOCK_N)
    acc = read(expanded(acc, None, xa, b, near_rows, near_columns, scale, SHAPE, MODE), MODE)
    if u is not None:
        store_tile(u, acc, rows, columns, m, N, EVEN=N % SHAPE.BLOCK_N == 0)
    if bias is not None:
        acc += load_bias(bias, columns, SHAPE).to(tl.float32)[None, :]
    store_tile(y, acc, rows, columns, m, N, EVEN=N % SHAPE.BLOCK_N == 0)

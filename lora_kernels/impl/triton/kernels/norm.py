"""The norm n = ‖W + scaling · B A‖ of each row, which DoRA's magnitude is divided by.

A tile is NORM_ROWS rows of W over all of K, NORM_COLUMNS a step. In each step it

1. forms B A of the tile, a product over R, in float32 unless W, A and B are of one 16-bit type;
2. adds scaling times that to the tile of W, and the squares to its sums.

So W is read once, and no row is formed a second time: a sum of ‖w‖², 2 scaling · b·(A w) and what
B A leaves takes as many products, and loses its digits where W and B A cancel.

`norm_kernel` is the launch of the norm alone, a tile a program; the forward kernel has the same
tiles before its own.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels.memory import block_pointers, load_factor, scaling_of
from lora_kernels.impl.triton.kernels.products import plus_product, read, zeros


@triton.jit(do_not_specialize=["scaling"])
def norm_kernel(w, a, b, scaling_pointer, norm, scaling, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Store norm [N], float32, of the `Rows` w [N, K], a [R, K] and b [N, R]."""
    store_norms(w, a, b, norm, tl.program_id(0), scaling_of(scaling, scaling_pointer), SHAPE, MODE)


@triton.jit
def store_norms(w, a, b, norm, tile, scale, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Store the norms of a tile's rows; arguments as `norm_kernel`'s."""
    N: tl.constexpr = SHAPE.N
    K: tl.constexpr = SHAPE.K
    R: tl.constexpr = SHAPE.R
    ROWS: tl.constexpr = SHAPE.NORM_ROWS
    COLUMNS: tl.constexpr = SHAPE.NORM_COLUMNS
    own: tl.constexpr = w.pointer.dtype.element_ty
    SHORT: tl.constexpr = (
        own.primitive_bitwidth == 16
        and a.pointer.dtype.element_ty == own
        and b.pointer.dtype.element_ty == own
    )
    dtype: tl.constexpr = own if SHORT else tl.float32
    # float32's operands lie in registers, so few of them.
    STEP: tl.constexpr = SHAPE.NORM_RANKS if SHORT else 16
    rows = tile * ROWS + tl.arange(0, ROWS)
    # Beyond the edge the last row is repeated, and not stored.
    near_rows = tl.minimum(rows, N - 1)
    squares = zeros(ROWS, COLUMNS)
    for k in tl.range(0, K, COLUMNS, num_stages=2):
        within = (k + tl.arange(0, COLUMNS) < K)[None, :]
        update = zeros(ROWS, COLUMNS)
        for rank in tl.range(0, SHAPE.BLOCK_R, STEP, num_stages=2):
            ranks = rank + tl.arange(0, STEP)
            a_pointers = block_pointers(a.pointer, ranks, a.stride, k, COLUMNS)
            a_tile = tl.load(a_pointers, mask=(ranks < R)[:, None] & within, other=0.0).to(dtype)
            b_tile = load_factor(
                b.pointer, near_rows, b.stride, rank, R, STEP, EVEN=R == SHAPE.BLOCK_R
            ).to(dtype)
            update = plus_product(update, b_tile, a_tile, MODE)
        w_pointers = block_pointers(w.pointer, near_rows, w.stride, k, COLUMNS)
        w_tile = tl.load(w_pointers, mask=within, other=0.0).to(tl.float32)
        total = w_tile + read(update, MODE) * scale
        squares += total * total
    tl.store(norm + rows, tl.sqrt_rn(tl.sum(squares, 1)), mask=rows < N)

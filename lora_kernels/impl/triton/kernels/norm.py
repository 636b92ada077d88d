"""The norm kernel: n = ‖W + scaling · B A‖ of each row, which DoRA's magnitude is divided by.

A program takes BLOCK_N rows of W over all of K, BLOCK_K columns a step. In each it

1. forms B A of the tile, a product over R, in float32 unless W, A and B are of one 16-bit type;
2. adds scaling times that to the tile of W, and the squares to its sums.

So W is read once, and no row is formed a second time: a sum of ‖w‖², 2 scaling · b·(A w) and what
B A leaves takes as many products, and loses its digits where W and B A cancel.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels.memory import block_pointers, load_factor, scaling_of
from lora_kernels.impl.triton.kernels.products import plus_product, read, zeros


@triton.jit(do_not_specialize=["scaling"])
def norm_kernel(w, a, b, scaling_pointer, norm, scaling, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Store norm [N], float32, of the `Rows` w [N, K], a [R, K] and b [N, R]."""
    N: tl.constexpr = SHAPE.N
    K: tl.constexpr = SHAPE.K
    R: tl.constexpr = SHAPE.R
    BLOCK_K: tl.constexpr = SHAPE.BLOCK_K
    own: tl.constexpr = w.pointer.dtype.element_ty
    SHORT: tl.constexpr = (
        own.primitive_bitwidth == 16
        and a.pointer.dtype.element_ty == own
        and b.pointer.dtype.element_ty == own
    )
    dtype: tl.constexpr = own if SHORT else tl.float32
    # float32's operands lie in registers.
    STEP: tl.constexpr = SHAPE.RANKS if SHORT else SHAPE.RANKS_32
    scale = scaling_of(scaling, scaling_pointer)
    rows = tl.program_id(0) * SHAPE.BLOCK_N + tl.arange(0, SHAPE.BLOCK_N)
    # Beyond the edge the last row is repeated, and not stored.
    near_rows = tl.minimum(rows, N - 1)
    squares = zeros(SHAPE.BLOCK_N, BLOCK_K)
    for k in tl.range(0, K, BLOCK_K):
        within = (k + tl.arange(0, BLOCK_K) < K)[None, :]
        update = zeros(SHAPE.BLOCK_N, BLOCK_K)
        for rank in tl.range(0, SHAPE.BLOCK_R, STEP):
            ranks = rank + tl.arange(0, STEP)
            a_pointers = block_pointers(a.pointer, ranks, a.stride, k, BLOCK_K)
            a_tile = tl.load(a_pointers, mask=(ranks < R)[:, None] & within, other=0.0).to(dtype)
            b_tile = load_factor(
                b.pointer, near_rows, b.stride, rank, R, STEP, EVEN=R == SHAPE.BLOCK_R
            ).to(dtype)
            update = plus_product(update, b_tile, a_tile, MODE)
        w_pointers = block_pointers(w.pointer, near_rows, w.stride, k, BLOCK_K)
        w_tile = tl.load(w_pointers, mask=within, other=0.0).to(tl.float32)
        total = w_tile + read(update, MODE) * scale
        squares += total * total
    tl.store(norm + rows, tl.sqrt_rn(tl.sum(squares, 1)), mask=rows < N)

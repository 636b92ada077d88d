"""Device functions: the main loops of tiles of y and dx, with and without a shrink beside."""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.mask import keep_where, masks_by_element
from lora_kernels.impl.triton.kernels.memory import block_pointers, load_operand, wide
from lora_kernels.impl.triton.kernels.products import plus_product, read, settled, unfetched, zeros
from lora_kernels.impl.triton.kernels.weights import (
    load_weight_columns,
    load_weight_rows,
    weight_columns,
)


@triton.jit
def plain_steps(
    acc, x, w, begin, end, SHAPE: tl.constexpr, MODE: tl.constexpr, WRAPS: tl.constexpr
):
    """Return acc + x Wᵀ of two `Side`s, over columns of x from `begin` to `end`.

    WRAPS: whether `end` may lie beyond K, where the columns begin again at 0.
    """
    LENGTH: tl.constexpr = (SHAPE.K + SHAPE.BLOCK_K - 1) // SHAPE.BLOCK_K * SHAPE.BLOCK_K
    for step in tl.range(begin, end, SHAPE.BLOCK_K):
        k = step
        if WRAPS:
            # The right one of the two is the smaller: the other is negative, so huge, or beyond K.
            k = tl.minimum(step.to(tl.uint32), (step - LENGTH).to(tl.uint32)).to(tl.int32)
        x_tile = load_operand(x, k, SHAPE.K, SHAPE.BLOCK_K)
        w_tile = load_weight_rows(w, k, x_tile.dtype, SHAPE)
        if SHAPE.BY_COLUMNS and MODE.MMA == "mma" and x_tile.dtype != tl.float32:
            x_tile = unfetched(x_tile)
        acc = plus_product(acc, x_tile, w_tile.T, MODE)
    return acc


@triton.jit
def shrinking_steps(x, w, a, draw, begin, end, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Return x Wᵀ of two `Side`s and A D(x)ᵀ, over the same columns of x.

    D only drops here: the factor of kept elements comes with the complete sum.
    """
    # Copies to shared memory serve one layout of reader without bank conflicts: with two, x is
    # carried one step ahead in registers instead.
    CARRIED: tl.constexpr = MODE.DROPOUT and x.descriptor is None
    K: tl.constexpr = SHAPE.K
    BLOCK_K: tl.constexpr = SHAPE.BLOCK_K
    rows = x.first + tl.arange(0, SHAPE.BLOCK_M)
    near_ranks = tl.minimum(tl.arange(0, SHAPE.BLOCK_R), SHAPE.R - 1)
    a_rows = arguments.Side(None, block_pointers(a.pointer, near_ranks, a.stride, 0, BLOCK_K), 0)
    acc = zeros(SHAPE.BLOCK_M, SHAPE.BLOCK_N)
    if MODE.DROPOUT:
        shrunk = zeros(SHAPE.BLOCK_R, SHAPE.BLOCK_M)
    else:
        shrunk = zeros(SHAPE.BLOCK_M, SHAPE.BLOCK_R)
    if CARRIED:
        inside = begin + tl.arange(0, BLOCK_K) < K
        x_next = tl.load(x.pointers + begin, mask=inside[None, :], other=0.0)
    for k in tl.range(begin, end, BLOCK_K):
        if CARRIED:
            x_tile = x_next
            inside = k + BLOCK_K + tl.arange(0, BLOCK_K) < tl.minimum(end, K)
            x_next = tl.load(x.pointers + k + BLOCK_K, mask=inside[None, :], other=0.0)
        else:
            x_tile = load_operand(x, k, K, BLOCK_K)
        w_tile = load_weight_rows(w, k, x_tile.dtype, SHAPE)
        a_tile = load_operand(a_rows, k, K, BLOCK_K).to(x_tile.dtype)
        base_tile = x_tile
        if SHAPE.BY_COLUMNS and MODE.MMA == "mma" and x_tile.dtype != tl.float32:
            base_tile = unfetched(x_tile)
        acc = plus_product(acc, base_tile, w_tile.T, MODE)
        if MODE.DROPOUT:
            masks, _ = masks_by_element(rows, k, draw, K, BLOCK_K, MODE)
            if MODE.MMA == "wgmma" and not CARRIED:
                # Triton 3.8 leaves this product pending while the next copy overwrites x.
                acc = settled(acc)
            # As second operand it goes through shared memory: a register operand of an
            # asynchronous product could change while it is read.
            shrunk = plus_product(shrunk, a_tile, keep_where(masks, x_tile).T, MODE)
        else:
            shrunk = plus_product(shrunk, x_tile, a_tile.T, MODE)
    shrunk = read(shrunk, MODE)
    if MODE.DROPOUT:
        return acc, shrunk
    else:
        return acc, shrunk.T


@triton.jit
def dy_products(
    dy, call, w_descriptor, column, SHAPE: tl.constexpr, MODE: tl.constexpr, BASE: tl.constexpr,
    SHRINK: tl.constexpr,
):  # fmt: skip
    """Return dy W from `column` on if BASE, and dy B if SHRINK, of a `Side` of dy, float32."""
    N: tl.constexpr = SHAPE.N
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    acc = zeros(SHAPE.BLOCK_M, SHAPE.BLOCK_K)
    shrunk = zeros(SHAPE.BLOCK_M, SHAPE.BLOCK_R)
    steps = tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, SHAPE.BLOCK_R)
    w = arguments.Side(w_descriptor, weight_columns(call.w, w_descriptor, column, SHAPE), column)
    stride = None
    if SHAPE.BLOCKSIZE == 0:
        stride = call.w.stride
    b_pointers = block_pointers(call.b.pointer, steps, call.b.stride, 0, SHAPE.BLOCK_R)
    for n in tl.range(0, N, BLOCK_N):
        dy_tile = load_operand(dy, n, N, BLOCK_N)
        inside = (n + steps < N)[:, None]
        if BASE:
            w_tile = load_weight_columns(w, stride, n, dy_tile.dtype, SHAPE)
            base_tile = dy_tile
            if MODE.MMA == "mma" and dy_tile.dtype != tl.float32:
                base_tile = unfetched(dy_tile)
            acc = plus_product(acc, base_tile, w_tile, MODE)
        if SHRINK:
            pointers = b_pointers + wide(n) * call.b.stride
            if N % BLOCK_N == 0 and SHAPE.R == SHAPE.BLOCK_R:
                b_tile = tl.load(pointers)
            else:
                inside &= (ranks < SHAPE.R)[None, :]
                b_tile = tl.load(pointers, mask=inside, other=0.0)
            shrunk = plus_product(shrunk, dy_tile, b_tile.to(dy_tile.dtype), MODE)
    return acc, shrunk

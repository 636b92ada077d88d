"""Device functions: how a tile of W is loaded, by its format; today W is dense."""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels.memory import load_operand, operand_pointers, wide


@triton.jit
def weight_rows(w, descriptor, rows, SHAPE: tl.constexpr):
    """Return pointers for `load_weight_rows` to the given rows of W, inside the tensor."""
    return operand_pointers(w, descriptor, rows, 0, SHAPE.BLOCK_K)


@triton.jit
def load_weight_rows(w, k, SHAPE: tl.constexpr):
    """Load forward's tile [BLOCK_N, BLOCK_K] of W: a `Side`'s rows, from column k on."""
    return load_operand(w, k, SHAPE.K, SHAPE.BLOCK_K)


@triton.jit
def weight_columns(w, descriptor, column, SHAPE: tl.constexpr):
    """Return pointers for `load_weight_columns` to columns of W."""
    return operand_pointers(w, descriptor, tl.arange(0, SHAPE.BLOCK_N), column, SHAPE.BLOCK_K)


@triton.jit
def load_weight_columns(w, stride, n, SHAPE: tl.constexpr):
    """Load backward's tile [BLOCK_N, BLOCK_K] of W: a `Side`'s columns, from row n on."""
    if w.descriptor is not None:
        return w.descriptor.load([n, w.first])
    else:
        pointers = w.pointers + wide(n) * stride
        if SHAPE.N % SHAPE.BLOCK_N == 0 and SHAPE.K % SHAPE.BLOCK_K == 0:
            return tl.load(pointers)
        else:
            rows = n + tl.arange(0, SHAPE.BLOCK_N)
            columns = w.first + tl.arange(0, SHAPE.BLOCK_K)
            inside = (rows < SHAPE.N)[:, None] & (columns < SHAPE.K)[None, :]
            return tl.load(pointers, mask=inside, other=0.0)

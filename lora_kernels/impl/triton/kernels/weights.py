"""Device functions: how a tile of W is loaded, by its format: dense, or codes of four bits.

Codes are decoded where they are loaded, by chunks: a row of the tile, or what a block has of it. Of
each chunk the sixteen products of code and scale are formed in float32 and rounded once, to W's
dtype; then every code takes one of them. Rows begin where blocks do.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels.memory import (
    block_pointers,
    load_operand,
    operand_pointers,
    wide,
)


@triton.jit
def weight_rows(w, descriptor, rows, first, SHAPE: tl.constexpr):
    """Return what `load_weight_rows` reads of rows of W, inside the tensor, `first` and so on."""
    if SHAPE.BY_COLUMNS:
        steps = tl.arange(0, SHAPE.BLOCK_K)
        return block_pointers(w.pointer, steps, w.stride, first, SHAPE.BLOCK_N), w.stride
    elif SHAPE.BLOCKSIZE == 0:
        return operand_pointers(w, descriptor, rows, 0, SHAPE.BLOCK_K)
    else:
        return _code_pointers(w, first, 0, SHAPE)


@triton.jit
def load_weight_rows(w, k, dtype: tl.constexpr, SHAPE: tl.constexpr):
    """Load forward's tile [BLOCK_N, BLOCK_K] of W: a `Side`'s rows, from column k on."""
    if SHAPE.BY_COLUMNS:
        # Rows aren't clamped to be inside, but masked: so they are copied by vectors.
        pointers, stride = w.pointers
        pointers += wide(k) * stride
        if SHAPE.N % SHAPE.BLOCK_N == 0 and SHAPE.K % SHAPE.BLOCK_K == 0:
            tile = tl.load(pointers)
        else:
            columns = k + tl.arange(0, SHAPE.BLOCK_K)
            rows = w.first + tl.arange(0, SHAPE.BLOCK_N)
            inside = (columns < SHAPE.K)[:, None] & (rows < SHAPE.N)[None, :]
            tile = tl.load(pointers, mask=inside, other=0.0)
        return tile.T
    elif SHAPE.BLOCKSIZE == 0:
        return load_operand(w, k, SHAPE.K, SHAPE.BLOCK_K)
    else:
        EVEN: tl.constexpr = SHAPE.K % SHAPE.BLOCK_K == 0
        _, column = _chunk_places(SHAPE)
        return _decoded(w.pointers, k, k + column < SHAPE.K, EVEN, dtype, SHAPE)


@triton.jit
def weight_columns(w, descriptor, column, SHAPE: tl.constexpr):
    """Return what `load_weight_columns` reads of columns of W."""
    if SHAPE.BY_COLUMNS:
        near = tl.minimum(column + tl.arange(0, SHAPE.BLOCK_K), SHAPE.K - 1)
        return block_pointers(w.pointer, near, w.stride, 0, SHAPE.BLOCK_N)
    elif SHAPE.BLOCKSIZE == 0:
        steps = tl.arange(0, SHAPE.BLOCK_N)
        return operand_pointers(w, descriptor, steps, column, SHAPE.BLOCK_K)
    else:
        return _code_pointers(w, 0, column, SHAPE)


@triton.jit
def load_weight_columns(w, stride, n, dtype: tl.constexpr, SHAPE: tl.constexpr):
    """Load backward's tile [BLOCK_N, BLOCK_K] of W: a `Side`'s columns, from row n on."""
    EVEN: tl.constexpr = SHAPE.N % SHAPE.BLOCK_N == 0 and SHAPE.K % SHAPE.BLOCK_K == 0
    if SHAPE.BY_COLUMNS:
        return load_operand(w, n, SHAPE.N, SHAPE.BLOCK_N).T
    elif SHAPE.BLOCKSIZE > 0:
        row, column = _chunk_places(SHAPE)
        inside = (n + row < SHAPE.N) & (w.first + column < SHAPE.K)
        return _decoded(w.pointers, wide(n) * SHAPE.K, inside, EVEN, dtype, SHAPE)
    elif w.descriptor is not None:
        return w.descriptor.load([n, w.first])
    else:
        pointers = w.pointers + wide(n) * stride
        if EVEN:
            return tl.load(pointers)
        else:
            rows = n + tl.arange(0, SHAPE.BLOCK_N)
            columns = w.first + tl.arange(0, SHAPE.BLOCK_K)
            inside = (rows < SHAPE.N)[:, None] & (columns < SHAPE.K)[None, :]
            return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _chunk_places(SHAPE: tl.constexpr):
    """Return row and column of each chunk in the tile, row after row."""
    CHUNK: tl.constexpr = SHAPE.BLOCK_K if SHAPE.BLOCK_K < SHAPE.BLOCKSIZE else SHAPE.BLOCKSIZE
    COUNT: tl.constexpr = SHAPE.BLOCK_K // CHUNK
    chunks = tl.arange(0, SHAPE.BLOCK_N * COUNT)
    return chunks // COUNT, chunks % COUNT * CHUNK


@triton.jit
def _code_pointers(w, first, column, SHAPE: tl.constexpr):
    """Return pointers to the chunks' bytes and scales, from a row and a column on, and the code."""
    CHUNK: tl.constexpr = SHAPE.BLOCK_K if SHAPE.BLOCK_K < SHAPE.BLOCKSIZE else SHAPE.BLOCKSIZE
    row, own = _chunk_places(SHAPE)
    start = tl.minimum(first + row, SHAPE.N - 1).to(tl.int64) * SHAPE.K + (column + own)
    packed = (w.packed + start // 2)[:, None] + tl.arange(0, CHUNK // 2)[None, :]
    return packed, w.scales + start // SHAPE.BLOCKSIZE, tl.load(w.code + tl.arange(0, 16))


@triton.jit
def _decoded(pointers, ahead, inside, EVEN: tl.constexpr, dtype: tl.constexpr, SHAPE: tl.constexpr):
    """Return the tile [BLOCK_N, BLOCK_K] so many elements ahead, zero where not `inside`.

    Tiles begin with blocks, or lie within one. EVEN: whether every chunk is inside.
    """
    packed, scales, code = pointers
    packed += ahead // 2
    scales += ahead // SHAPE.BLOCKSIZE
    if EVEN:
        codes = tl.load(packed)
        scale = tl.load(scales)
    else:
        codes = tl.load(packed, mask=inside[:, None], other=0)
        scale = tl.load(scales, mask=inside, other=0.0)
    table = (code[None, :] * scale[:, None]).to(dtype)
    # The high half of a byte is the first of its two elements.
    early = tl.gather(table, (codes >> 4).to(tl.int32), 1)
    late = tl.gather(table, (codes & 15).to(tl.int32), 1)
    return tl.join(early, late).reshape(SHAPE.BLOCK_N, SHAPE.BLOCK_K)

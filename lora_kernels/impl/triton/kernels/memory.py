"""Device functions: loads, stores and the pointers to them."""

import triton
import triton.language as tl


@triton.jit
def wide(number):
    """Return a whole number as int64, for offsets; also where the interpreter has a Python int."""
    return tl.zeros((), tl.int64) + number


@triton.jit
def scaling_of(scaling, pointer):
    """Return the scaling, float32: the number, or what the pointer holds if there is one."""
    if pointer is None:
        return scaling
    else:
        return tl.load(pointer).to(tl.float32)


@triton.jit
def block_pointers(source, rows, stride, column, COLUMNS: tl.constexpr):
    """Return pointers to COLUMNS columns of the given rows, `column` first; 64-bit offsets."""
    return source + rows.to(tl.int64)[:, None] * stride + (column + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def operand_pointers(matrix, descriptor, rows, column, COLUMNS: tl.constexpr):
    """Return `block_pointers`; with a descriptor, which needs none, a placeholder."""
    if descriptor is None:
        return block_pointers(matrix.pointer, rows, matrix.stride, column, COLUMNS)
    else:
        return rows


@triton.jit
def load_operand(side, column, LIMIT: tl.constexpr, COLUMNS: tl.constexpr):
    """Load the tile of a `Side`'s rows from a column on, zero from column LIMIT on.

    Its pointers are those of column 0, rows already inside the tensor. A descriptor knows its
    limits.
    """
    if side.descriptor is not None:
        return side.descriptor.load([side.first, column])
    elif LIMIT % COLUMNS == 0:
        return tl.load(side.pointers + column)
    else:
        inside = column + tl.arange(0, COLUMNS) < LIMIT
        return tl.load(side.pointers + column, mask=inside[None, :], other=0.0)


@triton.jit
def load_factor(
    pointer, rows, stride, rank, R: tl.constexpr, RANKS: tl.constexpr, EVEN: tl.constexpr
):
    """Load RANKS columns from `rank` on of the given rows of a [., R] tensor, zero beyond R.

    EVEN: whether no column is beyond.
    """
    ranks = rank + tl.arange(0, RANKS)
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + ranks[None, :]
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(ranks < R)[None, :], other=0.0)


@triton.jit
def load_b(b, rows, rank, R: tl.constexpr, RANKS: tl.constexpr, EVEN: tl.constexpr):
    """Load RANKS columns from `rank` on of the given rows of B, as `load_factor`."""
    ranks = rank + tl.arange(0, RANKS)
    pointers = b.pointer + rows.to(tl.int64)[:, None] * b.stride + (ranks * b.step)[None, :]
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(ranks < R)[None, :], other=0.0)


@triton.jit
def store_factor(pointer, tile, rows, limit, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Store tile [len(rows), BLOCK_R] to the rows below `limit` of a contiguous [., R] tensor."""
    ranks = tl.arange(0, BLOCK_R)
    pointers = pointer + rows.to(tl.int64)[:, None] * R + ranks[None, :]
    inside = (rows < limit)[:, None] & (ranks < R)[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def store_tile(pointer, tile, rows, columns, limit, LIMIT: tl.constexpr, EVEN: tl.constexpr):
    """Store a tile to the rows and columns within a contiguous [limit, LIMIT] tensor.

    EVEN: whether no column is beyond.
    """
    pointers = (pointer + columns)[None, :] + rows.to(tl.int64)[:, None] * LIMIT
    inside = (rows < limit)[:, None]
    if not EVEN:
        inside &= (columns < LIMIT)[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=inside)

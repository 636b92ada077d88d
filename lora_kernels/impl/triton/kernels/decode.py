"""Kernels that decode a quantised W [N, K], as `operands` defines it, for plans that read it dense.

    codebook_kernel    4 bits: rn(code[nibble i] · absmax[i // BLOCKSIZE]), i = n · K + k
    scaled_kernel      8 bits: rn(codes[n, k] · s[n // ROWS, k // COLUMNS])
    absmax_kernel      nested scales alone, for loops that decode the codes themselves

A program takes a piece of W; each product is formed in float32 and rounded once, to W's dtype.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels.memory import block_pointers, wide
from lora_kernels.impl.triton.kernels.products import apart


@triton.jit
def absmax_of(absmax, blocks, inside):
    """Return the scales, float32, of blocks that are `inside`; nested ones are rounded twice."""
    NESTED_BLOCK: tl.constexpr = 256
    numbers = tl.load(absmax.numbers + blocks, mask=inside, other=0)
    if absmax.code is None:
        return numbers
    else:
        own = tl.load(absmax.code + numbers.to(tl.int32))
        scales = tl.load(absmax.scales + blocks // NESTED_BLOCK, mask=inside, other=0.0)
        return apart(own, scales) + tl.load(absmax.offset)


@triton.jit
def absmax_kernel(absmax, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store the SIZE scales of blocks, BLOCK a program."""
    blocks = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = blocks < SIZE
    tl.store(out + blocks, absmax_of(absmax, blocks, inside), mask=inside)


@triton.jit
def codebook_kernel(codes, code, absmax, w, SHAPE: tl.constexpr):
    """Store W's SIZE elements, PIECES pieces of PIECE a program, each within one block."""
    HALF: tl.constexpr = SHAPE.PIECE // 2
    first = wide(tl.program_id(0)) * SHAPE.PIECES
    pieces = first + tl.arange(0, SHAPE.PIECES)
    offsets = block_pointers(0, pieces, HALF, 0, HALF)
    blocks = pieces * SHAPE.PIECE // SHAPE.BLOCKSIZE
    scales = absmax_of(absmax, blocks, pieces * SHAPE.PIECE < SHAPE.SIZE)[:, None]
    EVEN: tl.constexpr = SHAPE.SIZE % (SHAPE.PIECES * SHAPE.PIECE) == 0
    if EVEN:
        packed = tl.load(codes + offsets)
    else:
        packed = tl.load(codes + offsets, mask=2 * offsets < SHAPE.SIZE, other=0)
    # The high half of a byte is the first of its two elements.
    early = tl.load(code + (packed >> 4).to(tl.int32)) * scales
    late = tl.load(code + (packed & 15).to(tl.int32)) * scales
    tile = tl.join(early, late).reshape(SHAPE.PIECES, SHAPE.PIECE)
    places = block_pointers(0, pieces, SHAPE.PIECE, 0, SHAPE.PIECE)
    if EVEN:
        tl.store(w + places, tile.to(w.dtype.element_ty))
    else:
        tl.store(w + places, tile.to(w.dtype.element_ty), mask=places < SHAPE.SIZE)


@triton.jit
def scaled_kernel(codes, scales, w, SHAPE: tl.constexpr):
    """Store a tile of W [N, K], BLOCK_N by BLOCK_K; float8's codes and scales come as bytes."""
    TILES: tl.constexpr = (SHAPE.K + SHAPE.BLOCK_K - 1) // SHAPE.BLOCK_K
    WIDTH: tl.constexpr = (SHAPE.K + SHAPE.COLUMNS - 1) // SHAPE.COLUMNS
    tile = tl.program_id(0)
    rows = tile // TILES * SHAPE.BLOCK_N + tl.arange(0, SHAPE.BLOCK_N)
    columns = tile % TILES * SHAPE.BLOCK_K + tl.arange(0, SHAPE.BLOCK_K)
    inside = (rows < SHAPE.N)[:, None] & (columns < SHAPE.K)[None, :]
    source = block_pointers(codes.pointer, rows, codes.stride, 0, 1) + columns[None, :]
    numbers = tl.load(source, mask=inside, other=0)
    if SHAPE.FLOAT8:
        numbers = from_e4m3(numbers)
    else:
        numbers = numbers.to(tl.float32)
    own = block_pointers(scales, rows // SHAPE.ROWS, WIDTH, 0, 1)
    if SHAPE.COLUMNS % SHAPE.BLOCK_K == 0 or SHAPE.COLUMNS >= SHAPE.K:
        # A tile lies in one column of blocks.
        own += tile % TILES * SHAPE.BLOCK_K // SHAPE.COLUMNS
        loaded = tl.load(own, mask=(rows < SHAPE.N)[:, None], other=0)
    else:
        own += (columns // SHAPE.COLUMNS)[None, :]
        loaded = tl.load(own, mask=inside, other=0)
    if loaded.dtype == tl.uint8:
        loaded = from_e8m0(loaded)
    else:
        loaded = loaded.to(tl.float32)
    if SHAPE.DIVISOR != 1:
        loaded *= 1 / SHAPE.DIVISOR
    places = block_pointers(w, rows, SHAPE.K, 0, 1) + columns[None, :]
    tl.store(places, (numbers * loaded).to(w.dtype.element_ty), mask=inside)


@triton.jit
def from_e4m3(bytes_):
    """Return the float32 numbers that bytes mean as float8_e4m3fn, exactly.

    Exponent and mantissa are put where float32 has its own, 120 powers of two too low; subnormal
    ones are subnormal there, too. sm_80 has no instruction for it.
    """
    word = bytes_.to(tl.int32)
    number = ((word & 0x7F) << 20 | (word & 0x80) << 24).to(tl.float32, bitcast=True)
    return tl.where((word & 0x7F) == 0x7F, float("nan"), number * 2.0**120)


@triton.jit
def from_e8m0(bytes_):
    """Return the powers of two, float32, that bytes mean as float8_e8m0fnu; 255 is NaN."""
    word = bytes_.to(tl.int32)
    # 2⁻¹²⁷ is subnormal; NaN has the same bit set, in infinity.
    edge = ((word == 0) | (word == 255)).to(tl.int32) << 22
    return (word << 23 | edge).to(tl.float32, bitcast=True)

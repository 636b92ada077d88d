"""Device functions: the dropout mask of `reference.keep_mask`, eight columns a Philox call."""

import triton
import triton.language as tl

from lora_kernels._triton.tiles import INTERPRETED


@triton.jit
def philox_words(counter, key_low, key_high, WIDE: tl.constexpr):
    """Return the four words of Philox-4x32-10 for each counter; the counter's high half is zero.

    counter: uint32, or uint64 with WIDE; key_low, key_high: uint32 scalars.
    Below 2³² counters three of the four counter words are zero, so that half of the first two
    rounds is scalar work.
    """
    c0 = counter.to(tl.uint32)
    if WIDE:
        c1 = (counter >> 32).to(tl.uint32)
    else:
        c1 = tl.zeros((), tl.uint32)
    c2 = tl.zeros((), tl.uint32)
    c3 = tl.zeros((), tl.uint32)
    for _ in tl.static_range(10):
        low0, high0 = _multiply(c0, 0xD2511F53)
        low1, high1 = _multiply(c2, 0xCD9E8D57)
        c0 = _xor3(high1, c1, key_low)
        c1 = low1
        c2 = _xor3(high0, c3, key_high)
        c3 = low0
        key_low += 0x9E3779B9
        key_high += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _multiply(value, factor: tl.constexpr):
    """Return the low and high words of a 32 x 32 bit product."""
    if INTERPRETED:
        wide = value.to(tl.uint64) * factor
        return wide.to(tl.uint32), (wide >> 32).to(tl.uint32)
    # LLVM takes a 64-bit product apart by shifts; this is one instruction for both words.
    return tl.inline_asm_elementwise(
        "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$0, $1}, p; }",
        "=r,=r,r,r",
        [value, tl.full((), factor, tl.uint32)],
        (tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _xor3(a, b, c):
    if INTERPRETED:
        return a ^ b ^ c
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0x96;", "=r,r,r,r", [a, b, c], tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _counters(rows, columns, K: tl.constexpr, WIDE: tl.constexpr):
    """Return the counters [len(rows), len(columns)] of rows and groups of eight columns."""
    GROUPS: tl.constexpr = (K + 7) // 8
    if WIDE:
        return rows.to(tl.uint64)[:, None] * GROUPS + columns.to(tl.uint64)[None, :]
    else:
        return rows.to(tl.uint32)[:, None] * GROUPS + columns.to(tl.uint32)[None, :]


@triton.jit
def lanes_by_call(rows, column, seed, K: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Return the 16-bit lanes, uint16 [len(rows), COLUMNS], of the tile from `column` on.

    rows: int32, row numbers; column: a multiple of eight; K: columns of the whole activation.
    One Philox call makes eight lanes in whatever layout suits it; for tiles whose layout a matrix
    product dictates, where neighbouring columns lie in different threads.
    """
    groups = column // 8 + tl.arange(0, COLUMNS // 8)
    counter = _counters(rows, groups, K, WIDE)
    w0, w1, w2, w3 = philox_words(counter, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), WIDE)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    lanes = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    return lanes.reshape(rows.shape[0], COLUMNS)


@triton.jit
def lanes_by_element(
    rows, column, seed, K: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """Return the same lanes, each element computing its own.

    Where a thread holds eight neighbouring columns, as tiles loaded from memory lie, the compiler
    finds the eight calls to be one; and nothing but elementwise work stands between the tile and
    the product it feeds, so the tile keeps the layout that is free of bank conflicts.
    """
    columns = tl.arange(0, COLUMNS)
    counter = _counters(rows, columns // 8 + column // 8, K, WIDE)
    w0, w1, w2, w3 = philox_words(counter, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), WIDE)
    lane = (columns % 8)[None, :]
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    return tl.where(lane % 2 == 0, word, word >> 16).to(tl.uint16)


@triton.jit
def keep_where(tile, lanes, threshold):
    """Return tile where its lane is at least the threshold, else zero."""
    if INTERPRETED or tile.dtype.primitive_bitwidth != 16:
        return tl.where(lanes.to(tl.int32) >= threshold, tile, 0.0)
    else:
        # Two elements a register, compared in its high half, where the bits below don't matter.
        # A mask of booleans would also make Triton lay the tile out for 8-bit products.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bound, low, high;
            shl.b32 bound, $3, 16;
            shl.b32 low, $2, 16;
            set.ge.u32.u32 low, low, bound;
            set.ge.u32.u32 high, $2, bound;
            prmt.b32 low, low, high, 0x7632;
            and.b32 $0, $1, low;
            }""",
            "=r,r,r,r,r",
            [tile, lanes, threshold],
            tile.dtype,
            is_pure=True,
            pack=2,
        )

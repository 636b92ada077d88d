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
def words_by_call(rows, column, seed, K: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Return the lanes of the tile from `column` on, two a word: uint32 [len(rows), COLUMNS / 2].

    rows: int32, row numbers; column: a multiple of eight; K: columns of the whole activation.
    One Philox call makes eight lanes in whatever layout suits it; for tiles whose layout a matrix
    product dictates, where a thread has pairs of neighbouring columns.
    """
    groups = column // 8 + tl.arange(0, COLUMNS // 8)
    counter = _counters(rows, groups, K, WIDE)
    w0, w1, w2, w3 = philox_words(counter, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), WIDE)
    even = tl.join(w0, w2).permute(2, 0, 1)
    odd = tl.join(w1, w3).permute(2, 0, 1)
    words = tl.join(even, odd).permute(1, 2, 0, 3)
    return words.reshape(rows.shape[0], COLUMNS // 2)


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
def lane_bound(threshold):
    """Return the threshold as lanes are compared with it: in the high half of a word."""
    return (tl.zeros((), tl.uint32) + threshold) << 16


@triton.jit
def keep_where(tile, lanes, bound):
    """Return tile where its lane is at least the threshold, else zero; bound: `lane_bound`."""
    if INTERPRETED or tile.dtype.primitive_bitwidth != 16:
        return tl.where((lanes.to(tl.uint32) << 16) >= bound, tile, 0.0)
    else:
        # Two elements a register, compared in its high half, where the bits below don't matter.
        # A mask of booleans would also make Triton lay the tile out for 8-bit products.
        return tl.inline_asm_elementwise(
            """{
            .reg .pred low, high;
            .reg .b32 shifted;
            shl.b32 shifted, $2, 16;
            setp.lt.u32 low, shifted, $3;
            setp.lt.u32 high, $2, $3;
            @low and.b32 $0, $0, 0xffff0000;
            @high and.b32 $0, $0, 0x0000ffff;
            }""",
            "=r,0,r,r,r",
            [tile, lanes, bound],
            tile.dtype,
            is_pure=True,
            pack=2,
        )


@triton.jit
def plus_kept(acc, addend, words, bound):
    """Return acc + addend where the lane in `words_by_call` is at least the threshold, else acc."""
    ROWS: tl.constexpr = acc.shape[0]
    PAIRS: tl.constexpr = acc.shape[1] // 2
    low, high = acc.reshape(ROWS, PAIRS, 2).split()
    low_addend, high_addend = addend.reshape(ROWS, PAIRS, 2).split()
    if INTERPRETED:
        low += tl.where((words << 16) >= bound, low_addend, 0.0)
        high += tl.where(words >= bound, high_addend, 0.0)
    else:
        # Not pure: what it reads may come from tensor memory, see `tiles.settled`.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .pred low, high;
            .reg .b32 shifted;
            shl.b32 shifted, $6, 16;
            setp.ge.u32 low, shifted, $7;
            setp.ge.u32 high, $6, $7;
            @low add.f32 $0, $0, $4;
            @high add.f32 $1, $1, $5;
            }""",
            "=r,=r,0,1,r,r,r,r",
            [low, high, low_addend, high_addend, words, bound],
            (tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    return tl.join(low, high).reshape(ROWS, 2 * PAIRS)

"""Device functions: the mask of the reference's `keep_mask`, eight columns a Philox call."""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments

PACKED_THRESHOLDS = tl.constexpr(0x7F80)  # infinity as bfloat16


@triton.jit
def keep_scale(threshold):
    """Return 65536 / (65536 - threshold), the factor of kept elements."""
    return 65536.0 / (65536 - threshold)


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
def seed_of(pointer):
    """Return the seed, int64, that one lane of each warp reads for all.

    All lanes asking for it is one transaction, too, but counts as a request of each.
    """
    if arguments.INTERPRETED:
        return tl.load(pointer)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 lane, low, high;
            mov.u32 lane, %laneid;
            setp.eq.u32 first, lane, 0;
            @first ld.global.v2.b32 {low, high}, [$1];
            shfl.sync.idx.b32 low, low, 0, 31, -1;
            shfl.sync.idx.b32 high, high, 0, 31, -1;
            mov.b64 $0, {low, high};
            }""",
            "=l,l",
            [pointer],
            tl.int64,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _multiply(value, factor: tl.constexpr):
    """Return the low and high words of a 32 x 32 bit product."""
    if arguments.INTERPRETED:
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
    if arguments.INTERPRETED:
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
def masks_by_call(rows, column, draw, K: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr):
    """Return uint16 [len(rows), COLUMNS], ones where an element of the tile is kept, else zero.

    rows: int32, row numbers; column: a multiple of eight; K: columns of the whole activation.
    One Philox call makes eight lanes in whatever layout suits it; for tiles whose layout a matrix
    product dictates, where a thread has pairs of neighbouring columns.
    """
    groups = column // 8 + tl.arange(0, COLUMNS // 8)
    w0, w1, w2, w3 = _kept_lanes(rows, groups, draw, K, MODE)
    even = tl.join(w0, w2).permute(2, 0, 1)
    odd = tl.join(w1, w3).permute(2, 0, 1)
    words = tl.join(even, odd).permute(1, 2, 0, 3)
    return _halves(words.reshape(rows.shape[0], COLUMNS // 2))


@triton.jit
def masks_by_element(
    rows, column, draw, K: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr
):
    """Return the same masks, and as uint32 [len(rows), COLUMNS / 8] the groups' bits.

    Where a thread holds eight neighbouring columns, as tiles loaded from memory lie, it makes one
    call for them; and nothing but elementwise work stands between the tile and the product it
    feeds, so the tile keeps the layout that is free of bank conflicts.
    A group's bits are a byte: even columns from bit 0 on, odd ones from bit 4 on.
    """
    groups = column // 8 + tl.arange(0, COLUMNS // 8)
    w0, w1, w2, w3 = _kept_lanes(rows, groups, draw, K, MODE)
    bits = _group_bits(w0, w1, w2, w3)
    w0, w1, w2, w3 = w0[:, :, None], w1[:, :, None], w2[:, :, None], w3[:, :, None]
    pair = tl.arange(0, 4)[None, None, :]
    words = tl.where(pair < 2, tl.where(pair < 1, w0, w1), tl.where(pair < 3, w2, w3))
    return _halves(words.reshape(rows.shape[0], COLUMNS // 2)), bits


@triton.jit
def masks_by_bits(bits):
    """Return the same masks of a tile whose bits were stored: uint32 [rows, COLUMNS / 32]."""
    ROWS: tl.constexpr = bits.shape[0]
    PAIRS: tl.constexpr = bits.shape[1] * 16
    pair = tl.arange(0, PAIRS)
    place, group = (pair % 4)[None, :], (pair // 4 % 4)[None, :]
    words = bits[:, :, None].broadcast_to(ROWS, PAIRS // 16, 16).reshape(ROWS, PAIRS)
    # A group's even and odd element become the top bits of its byte, each in a word of its own.
    even, odd = words << (7 - place), words << (3 - place)
    if arguments.INTERPRETED:
        low = tl.where((even >> (8 * group)) & 0x80 != 0, 0xFFFF, 0).to(tl.uint32)
        high = tl.where((odd >> (8 * group)) & 0x80 != 0, 0xFFFF, 0).to(tl.uint32)
        return _halves(low | (high << 16))
    else:
        # Each half of the result repeats the top bit of byte `group`, of even and of odd.
        chosen = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [even, odd, 0xCC88 + 0x1111 * group],
            tl.uint32,
            is_pure=True,
            pack=1,
        )
        return _halves(chosen)


@triton.jit
def _halves(words):
    """Return uint16 [rows, 2 · columns]: of each word the lower half, then the upper one."""
    words = words[:, :, None]
    halves = tl.where(tl.arange(0, 2)[None, None, :] == 0, words, words >> 16).to(tl.uint16)
    return halves.reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def _kept_lanes(rows, groups, draw, K: tl.constexpr, MODE: tl.constexpr):
    """Return the four words of each group, ones in the halves of kept lanes, zeros elsewhere."""
    counter = _counters(rows, groups, K, MODE.WIDE)
    key_low, key_high = draw.seed.to(tl.uint32), (draw.seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(counter, key_low, key_high, MODE.WIDE)
    w0 = _at_least(w0, draw.threshold, MODE.PACKED)
    w1 = _at_least(w1, draw.threshold, MODE.PACKED)
    w2 = _at_least(w2, draw.threshold, MODE.PACKED)
    return w0, w1, w2, _at_least(w3, draw.threshold, MODE.PACKED)


@triton.jit
def _at_least(words, threshold, PACKED: tl.constexpr):
    """Return ones in each half of the words that is at least the threshold, zeros elsewhere.

    PACKED: whether instructions of sm_90 on pairs do, for thresholds up to PACKED_THRESHOLDS.
    """
    if arguments.INTERPRETED:
        low = tl.where((words & 0xFFFF) >= threshold, 0xFFFF, 0).to(tl.uint32)
        high = tl.where((words >> 16) >= threshold, 0xFFFF, 0).to(tl.uint32)
        return low | (high << 16)
    elif PACKED:
        # Moved so that, read as bfloat16, what is dropped ends with infinity: NaNs above it, all
        # negative numbers and what wrapped around to the start are less or unordered.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 moved;
            add.u16x2 moved, $1, $2;
            set.ltu.u32.bf16x2 $0, moved, $2;
            }""",
            "=r,r,r",
            [words, (PACKED_THRESHOLDS + 1 - threshold) * 0x10001],
            tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        # Both halves at once. With its top bit set a half borrows nothing from its neighbour, and
        # the top bit of the difference compares the other 15. Where the threshold's own top bit
        # is set it takes that and the half's (their majority with 0), else either (with 1).
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 least;
            or.b32 least, $1, 0x80008000;
            sub.u32 least, least, $2;
            lop3.b32 least, least, $1, $3, 0xe8;
            prmt.b32 $0, least, least, 0xbb99;
            }""",
            "=r,r,r,r",
            [words, (threshold & 0x7FFF) * 0x10001, tl.where(threshold < 0x8000, -1, 0)],
            tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _group_bits(w0, w1, w2, w3):
    """Return a group's bits: even lanes, which the lower halves hold, from bit 0 on."""
    if arguments.INTERPRETED:
        a = (w0 & 0x55555555) | (w1 & 0xAAAAAAAA)
        b = (w2 & 0x55555555) | (w3 & 0xAAAAAAAA)
        a = (a & 0x33333333) | (b & 0xCCCCCCCC)
        return (a & 0x0F) | ((a >> 16) & 0xF0)
    else:
        # 0xe4 takes the bits of the first operand where the third has ones, else of the second.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            lop3.b32 a, $1, $2, 0x55555555, 0xe4;
            lop3.b32 b, $3, $4, 0x55555555, 0xe4;
            lop3.b32 a, a, b, 0x33333333, 0xe4;
            shr.u32 b, a, 16;
            lop3.b32 $0, a, b, 0x0000000f, 0xe4;
            }""",
            "=r,r,r,r,r",
            [w0, w1, w2, w3],
            tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def keep_where(masks, tile):
    """Return tile where its mask is ones, else zero."""
    if arguments.INTERPRETED or tile.dtype.primitive_bitwidth != 16:
        return tl.where(masks != 0, tile, 0.0)
    else:
        # Two elements a register. A mask of booleans would also make Triton lay the tile out for
        # 8-bit products.
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [masks, tile], tile.dtype, is_pure=True, pack=2
        )


@triton.jit
def choose(masks, kept, dropped):
    """Return kept where its mask is ones, else dropped; of 16-bit tiles."""
    if arguments.INTERPRETED:
        return tl.where(masks != 0, kept, dropped)
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $2, $3, $1, 0xe4;",
            "=r,r,r,r",
            [masks, kept, dropped],
            kept.dtype,
            is_pure=True,
            pack=2,
        )

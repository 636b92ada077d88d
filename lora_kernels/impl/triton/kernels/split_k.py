"""Device functions: split-K of xa, the sums that one part of K leaves for the next.

An xa column sums its own part of K, adds the sums that the part before left, and leaves the result
for the part after. On their way sums have fewer bits than float32: the upper 16 lie where xa will
be, in memory that is written and read anyway, and LOW more beside them. That makes 12 significant
bits for bfloat16 and 16 for float16, four or five more than the result keeps. Half of the ranks
make the upper halves of words, the other half the lower ones.
"""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.memory import block_pointers


@triton.jit
def by_threads(sums):
    """Return sums [ranks, rows] as [ranks · rows / 8, 8], eight to a thread as they lie.

    That is the layout of warps' products whose warps stand side by side; any other is right, too,
    but takes a detour through shared memory.
    """
    RANKS: tl.constexpr = sums.shape[0]
    ROWS: tl.constexpr = sums.shape[1]
    parts = sums.reshape(2, RANKS // 16, 8, 2, ROWS // 16, 4, 2)
    return parts.permute(4, 2, 5, 1, 0, 3, 6).reshape(RANKS * ROWS // 8, 8)


@triton.jit
def by_ranks(sums, RANKS: tl.constexpr):
    """Return [ranks · rows / 8, 8] as [ranks, rows] again."""
    ROWS: tl.constexpr = sums.shape[0] * 8 // RANKS
    parts = sums.reshape(ROWS // 16, 8, 4, RANKS // 16, 2, 2, 2)
    return parts.permute(4, 3, 1, 5, 0, 2, 6).reshape(RANKS, ROWS)


@triton.jit
def store_part(sums, high, low, panel, LOW: tl.constexpr):
    """Leave sums [., 8] of a row panel, rounded, in `high` and `low`, both int32."""
    HALF: tl.constexpr = 1 << (15 - LOW)
    MASK: tl.constexpr = ((1 << LOW) - 1) << LOW
    COUNT: tl.constexpr = sums.shape[0]
    # NVIDIA's NaN has all bits but its sign set: rounded up it would be -0.
    bits = tl.minimum(sums.to(tl.int32, bitcast=True), 0x7FFFFFFF - HALF) + HALF
    bits = bits.to(tl.uint32, bitcast=True).reshape(COUNT, 2, 4).permute(0, 2, 1)
    first, second = bits.split()
    words = _with_bits(first >> 16, second, 0xFFFF0000)
    rest = _joined(_with_bits(first >> (16 - LOW), second >> (16 - 2 * LOW), MASK), 2 * LOW)
    places = panel * COUNT + tl.arange(0, COUNT)
    tl.store(block_pointers(high, places, 4, 0, 4), words.to(tl.int32, bitcast=True))
    WORDS: tl.constexpr = LOW // 4
    tl.store(block_pointers(low, places, WORDS, 0, WORDS), rest.to(tl.int32, bitcast=True))


@triton.jit
def load_part(high, low, panel, COUNT: tl.constexpr, LOW: tl.constexpr):
    """Return the sums [COUNT, 8], float32, that `store_part` left."""
    MASK: tl.constexpr = ((1 << LOW) - 1) << (16 - LOW)
    WORDS: tl.constexpr = LOW // 4
    places = panel * COUNT + tl.arange(0, COUNT)
    words = tl.load(block_pointers(high, places, 4, 0, 4)).to(tl.uint32, bitcast=True)
    rest = tl.load(block_pointers(low, places, WORDS, 0, WORDS)).to(tl.uint32, bitcast=True)
    pairs = _taken_apart(rest, 2 * LOW)
    first = _with_bits(words << 16, pairs << (16 - LOW), MASK)
    second = _with_bits(words & 0xFFFF0000, pairs << (16 - 2 * LOW), MASK)
    sums = tl.join(first, second).permute(0, 2, 1).reshape(COUNT, 8)
    return sums.to(tl.float32, bitcast=True)


@triton.jit
def _joined(parts, BITS: tl.constexpr):
    """Return words of neighbours' lowest BITS bits, 32 / BITS of them each."""
    if BITS == 32:
        return parts
    else:
        even, odd = parts.reshape(parts.shape[0], parts.shape[1] // 2, 2).split()
        MASK: tl.constexpr = ((1 << BITS) - 1) << BITS
        return _joined(_with_bits(even, odd << BITS, MASK), 2 * BITS)


@triton.jit
def _taken_apart(words, BITS: tl.constexpr):
    """Return the neighbours, with anything above their BITS bits."""
    if BITS == 32:
        return words
    else:
        words = _taken_apart(words, 2 * BITS)
        return tl.join(words, words >> BITS).reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def _with_bits(words, others, BITS: tl.constexpr):
    """Return uint32 words with some of their bits those of others."""
    if arguments.INTERPRETED:
        return words ^ ((words ^ others) & BITS)
    else:
        # Bits of the third operand choose the second, else the first.
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xd8;",
            "=r,r,r,n",
            [words, others, BITS],
            tl.uint32,
            is_pure=True,
            pack=1,
        )

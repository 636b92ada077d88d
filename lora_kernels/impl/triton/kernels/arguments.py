"""Tuples of what kernels are given and of what their device functions hand on.

A kernel gets its tensors in tuples, and what is compiled in as two constants, SHAPE and MODE.
Numbers that change from call to call (M, scaling, threshold, segment) stay arguments of their own:
Triton specialises integers in tuples, `do_not_specialize` or not. So do descriptors: Triton 3.6's
launcher finds none in tuples.

Device functions name all of this as `arguments.Side`: what they name by itself Triton compares at
every launch with what it was.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Rows(NamedTuple):
    """A matrix: a pointer, how far apart rows are, and elements of a row, 1 but for groups' B."""

    pointer: Any
    stride: Any
    step: Any = 1


class Stack(NamedTuple):
    """Matrices of groups, as `Rows` each: a pointer to the first, and how far apart they are."""

    pointer: Any
    apart: Any
    stride: Any
    step: Any = 1


class Absmax(NamedTuple):
    """Scales of blocks of codes: float32 `numbers`, or where they are nested bytes.

    They stand for code[byte] · scales[block // 256] + offset; the three are None otherwise.
    """

    numbers: Any
    code: Any
    scales: Any
    offset: Any


class Codes(NamedTuple):
    """A W of four bits: packed codes, float32 scales of blocks, the sixteen numbers of the code."""

    packed: Any
    scales: Any
    code: Any


class Call(NamedTuple):
    """A call's parameters. bias: forward's; seed, scaling: numbers in memory; each may be None.

    Of groups w, a and b are stacks, bias and scaling `Rows` of one a group. gain: of DoRA's
    forward, a `Gain`.
    """

    w: Rows | Codes | Stack
    a: Rows | Stack
    b: Rows | Stack
    bias: Any
    seed: Any
    scaling: Any
    gain: Any = None


class Outputs(NamedTuple):
    """What forward writes: y, xa, and where split-K's sums are left, int32; u of DoRA, [M, N].

    `high` lies in xa's own memory. Both are None where there is one part, and where xa is float32:
    it holds sums itself.
    """

    y: Any
    xa: Any
    high: Any
    low: Any
    u: Any = None


class Factor(NamedTuple):
    """A contiguous matrix [M, R]: xa or dxa.

    units: float32, of float16's dxa, one for UNIT_ROWS rows each (`unit_of`); None: 1.
    """

    numbers: Any
    units: Any


class Gain(NamedTuple):
    """What DoRA's g is made of: magnitude [N], any float dtype, and norm [N], float32."""

    magnitude: Any
    norm: Any


class DzOutputs(NamedTuple):
    """What the dz pass writes: dz and dw, contiguous [M, N]; dmagnitude and dbias."""

    dz: Any
    dw: Any
    dm: Any
    dbias: Any


class Shared(NamedTuple):
    """What backward's programs tell each other by.

    flags: int32, one a row panel and the ticket, None where nobody waits; counters: int32, one a
        block of dB and dA; zero before and after.
    partials: float32 [blocks, segments, RANKS + 1, BLOCK_C] if there are several segments.
    mask: int32 [max(M, BLOCK_S), MASK_STRIDE], a bit for each element of x; None: all tiles draw.
        Tiles of dA, drawing it beside their copies, leave it to those of dx.
    """

    flags: Any
    counters: Any
    partials: Any
    mask: Any


class ForwardShape(NamedTuple):
    """Sizes of the layer and of forward's tiles."""

    N: int
    K: int
    R: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int  # R padded
    RANK_STEP: int  # ranks of one product of the expand
    GROUP: int  # row panels whose tiles follow each other
    XA_COLUMNS: int
    BLOCKSIZE: int = 0  # codes that share a scale; 0 of a dense W
    BY_COLUMNS: bool = False  # whether W lies as [K, N]
    NORM_ROWS: int = 0  # of DoRA's norm's tiles, as in `NormShape`; 0: there are none
    NORM_COLUMNS: int = 0
    NORM_RANKS: int = 0


class BackwardShape(NamedTuple):
    """Sizes of the layer and of backward's tiles: of dx [BLOCK_M, BLOCK_K], BLOCK_N a step."""

    N: int
    K: int
    R: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    RANK_STEP: int
    GROUP: int
    FUSED: bool  # whether column 0 of dx makes dxa
    RANKS: int  # of a tile of dA or dB,
    BLOCK_C: int  # its columns,
    BLOCK_S: int  # and its rows a step
    UNIT_ROWS: int
    MASK_STRIDE: int
    BLOCKSIZE: int = 0
    BY_COLUMNS: bool = False


class GroupedShape(NamedTuple):
    """Sizes of groups' layers and of either direction's tiles, as those of one layer."""

    N: int
    K: int
    R: int
    GROUPS: int
    PADDED: int  # more than GROUPS, a power of two
    ADAPTERS: int
    WEIGHTS: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    RANK_STEP: int
    GROUP: int
    BY_COLUMNS: bool
    RANKS: int
    BLOCK_C: int
    BLOCK_S: int
    BLOCKSIZE: int = 0


class ShrinkShape(NamedTuple):
    """Sizes of a shrink, over columns of v [M, L], and of its tiles. TRANSPOSED: f is [R, L]."""

    L: int
    R: int
    TRANSPOSED: bool
    BLOCK_M: int
    BLOCK_L: int
    BLOCK_R: int


class ExpandShape(NamedTuple):
    """Sizes of the layer and of the expand's tiles."""

    N: int
    R: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    RANK_STEP: int


class NormShape(NamedTuple):
    """Sizes of the layer and of the norm's tiles."""

    N: int
    K: int
    R: int
    BLOCK_R: int  # R padded
    NORM_ROWS: int  # of W and n, of a tile,
    NORM_COLUMNS: int  # its columns a step,
    NORM_RANKS: int  # and ranks of one product of 16 bits


class PassShape(NamedTuple):
    """Sizes of the layer and of the tiles of dB or dA that a pass over dy or x sums.

    BASE: whether dx holds a product already, of which D takes its part too.
    """

    N: int
    K: int
    R: int
    BLOCK_R: int  # R padded
    RANKS: int
    BLOCK_C: int
    BLOCK_S: int
    BASE: bool = False


class CodebookShape(NamedTuple):
    """Sizes of a W of four bits, and of what a program decodes of it."""

    SIZE: int  # N K
    BLOCKSIZE: int
    PIECE: int  # elements of a row of the tile,
    PIECES: int  # and its rows


class ScaledShape(NamedTuple):
    """Sizes of a W of eight bits, of its blocks and tiles. DIVISOR: of the scales."""

    N: int
    K: int
    ROWS: int
    COLUMNS: int
    DIVISOR: int
    FLOAT8: bool  # whether codes are e4m3's
    BLOCK_N: int
    BLOCK_K: int


class Mode(NamedTuple):
    """How a kernel computes.

    WIDE: whether the mask's counters have 64 bits; PACKED: whether lanes are compared in pairs.
    MMA: the matrix instruction, "mma", "wgmma" or "tcgen05"; PRECISION: of float32 products.
    """

    DROPOUT: bool
    WIDE: bool
    PACKED: bool
    MMA: str
    PRECISION: str


class Side(NamedTuple):
    """One operand of a tile: a descriptor, or else pointers; `first`: its first row or column.

    Of gathered rows, whose mask has other rows: what each of these is more than its place here.
    """

    descriptor: Any
    pointers: Any
    first: Any


class Draw(NamedTuple):
    """What D is drawn from; mask: where its bits are kept, or None."""

    seed: Any
    threshold: Any
    mask: Any


class Part(NamedTuple):
    """The index-th part of a row panel's xa, and the flag that counts parts."""

    panel: Any
    index: Any
    flag: Any


class Place(NamedTuple):
    """Where a tile of dx begins, of M rows; drawn: the rows of the mask that its rows have."""

    row: Any
    column: Any
    m: Any
    drawn: Any


class Segment(NamedTuple):
    """Rows [row, end) of M that a tile of dA or dB sums, from `column` of WIDTH and `rank` on."""

    row: Any
    end: Any
    m: Any
    column: Any
    rank: Any
    WIDTH: Any


class DySums(NamedTuple):
    """Where sums of dy's rows go, None where not wanted."""

    db: Any
    dbias: Any


class Named(NamedTuple):
    """Which row of a matrix each sorted row names, and which of the mask's `places`, or None."""

    source: Any
    drawn: Any
    places: Any


class Sums(NamedTuple):
    """float32 sums over rows: the product [RANKS, BLOCK_C], and the total [BLOCK_C] of one side."""

    product: Any
    total: Any

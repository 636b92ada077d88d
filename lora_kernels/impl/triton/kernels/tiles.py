"""Device functions shared by the kernels: tile order, operand loads, flags between programs."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def wide(number):
    """Return a whole number as int64, for offsets; also where the interpreter has a Python int."""
    return tl.zeros((), tl.int64) + number


@triton.jit
def settled(product):
    """Return a product, complete: what uses the result comes after the wait for it.

    Triton 3.8 may let a copy overwrite an operand of a pending product (sm_90), and LLVM may move
    reads of tensor memory's registers before the wait (sm_100); neither passes an assembly block.
    """
    if INTERPRETED:
        return product
    else:
        return tl.inline_asm_elementwise(
            "// $0", "=r,0", [product], tl.float32, is_pure=False, pack=1
        )


@triton.jit
def read(product, MMA: tl.constexpr):
    """Return a product for elementwise use: out of tensor memory, completely, where it is there."""
    if MMA == "tcgen05":
        return settled(product)
    else:
        return product


@triton.jit
def rounded_now(product, dtype: tl.constexpr):
    """Return a product, complete, in a 16-bit type, before the next one adds to its registers.

    Left to itself LLVM rounds where the result is used, and copies the sums to keep them so long.
    """
    if INTERPRETED:
        return product.to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [product], tl.bfloat16, is_pure=False, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [product], tl.float16, is_pure=False, pack=2
        )


@triton.jit
def unfetched(tile):
    """Return a tile as it is, in a way that the compiler doesn't see through.

    Triton 3.8 would load the first slice of both operands a step ahead (sm_80): for 24 registers,
    one more barrier and ten more instructions a step (SASS, 128x128x64).
    """
    ROWS: tl.constexpr = tile.shape[0]
    HALF: tl.constexpr = tile.shape[1] // 2
    halves = tile.T.reshape(2, HALF, ROWS)
    return halves.permute(2, 0, 1).reshape(ROWS, 2 * HALF)


@triton.jit
def opaque(numbers):
    """Return int32 numbers of which the compiler knows nothing, so that it joins no accesses."""
    if INTERPRETED:
        return numbers
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [numbers], tl.int32, is_pure=True, pack=1
        )


@triton.jit
def with_bits(words, others, BITS: tl.constexpr):
    """Return uint32 words with some of their bits those of others."""
    if INTERPRETED:
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


@triton.jit
def plus_product(acc, left, right, PRECISION: tl.constexpr):
    """Return acc + left right, summed in float32."""
    if left.dtype == tl.float32 and PRECISION == "ieee":
        # A sum for each step, then their sum: the error grows with the square root of either's
        # length, not of all of K. Without the block Triton would join the two again.
        return acc + settled(tl.dot(left, right, input_precision=PRECISION))
    else:
        return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def take(ticket, tiles):
    """Return the number of this program's next tile; from `tiles` on there is none.

    Numbers go out in order, each to a program that runs. So a tile that waits for lower ones alone
    waits for programs that run, however few do. The ticket is zero before and after a launch.
    """
    last = tiles + tl.num_programs(0) - 1
    if INTERPRETED:
        number = tl.atomic_add(ticket, 1, sem="relaxed")
        if number == last:
            tl.atomic_xchg(ticket, 0, sem="relaxed")
        return number
    else:
        # With Triton's own atomic ptxas takes 70 registers more, 255, and spills. What Triton lays
        # out in shared memory comes after the slot, and has to begin at a multiple of 1 KB.
        return tl.inline_asm_elementwise(
            """{
            .reg .pred first, last;
            .reg .b32 thread, taken;
            .shared .align 1024 .b32 slot[256];
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first atom.relaxed.gpu.global.add.u32 taken, [$1], 1;
            setp.eq.and.u32 last, taken, $2, first;
            @last st.relaxed.gpu.global.u32 [$1], 0;
            bar.sync 0;
            @first st.shared.b32 [slot], taken;
            bar.sync 0;
            ld.shared.b32 $0, [slot];
            }""",
            "=r,l,r",
            [ticket, last],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def grouped_tile(index, rows, columns, GROUP: tl.constexpr):
    """Return (row, column) of the index-th tile, GROUP rows at a time: operands stay in L2."""
    in_group = GROUP * columns
    first = index // in_group * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + index % in_group % height, index % in_group // height


@triton.jit
def block_pointers(source, rows, stride, column, COLUMNS: tl.constexpr):
    """Return pointers to COLUMNS columns of the given rows, `column` first; 64-bit offsets."""
    return source + rows.to(tl.int64)[:, None] * stride + (column + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def operand_pointers(source, descriptor, rows, stride, column, COLUMNS: tl.constexpr):
    """Return `block_pointers`; with a descriptor, which needs none, a placeholder."""
    if descriptor is None:
        return block_pointers(source, rows, stride, column, COLUMNS)
    else:
        return rows


@triton.jit
def load_operand(descriptor, pointers, row, column, LIMIT: tl.constexpr, COLUMNS: tl.constexpr):
    """Load the tile at (row, column), zero from column LIMIT on.

    pointers: those of column 0, rows already inside the tensor. A descriptor knows its limits.
    """
    if descriptor is not None:
        return descriptor.load([row, column])
    elif LIMIT % COLUMNS == 0:
        return tl.load(pointers + column)
    else:
        inside = column + tl.arange(0, COLUMNS) < LIMIT
        return tl.load(pointers + column, mask=inside[None, :], other=0.0)


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


@triton.jit
def publish(flag):
    """Make this program's stores visible to whoever waits on the flag."""
    # Each thread stored its part: all must have done so before one of them releases.
    tl.debug_barrier()
    tl.atomic_add(flag, 1, sem="release")


@triton.jit
def wait(flag, ARRIVALS: tl.constexpr):
    """Wait until ARRIVALS programs have published.

    The kernel ends by an error where that has lasted for about half a minute: far longer than any
    launch, so that they will never come.
    """
    if INTERPRETED:
        while tl.atomic_add(flag, 0, sem="acquire") < ARRIVALS:
            pass
    else:
        # One thread asks, the others stay at the barrier: no issue slots, no traffic.
        tl.inline_asm_elementwise(
            """{
            .reg .pred other, early, late;
            .reg .b32 thread, seen, began, now;
            mov.u32 thread, %tid.x;
            setp.ne.u32 other, thread, 0;
            @other bra arrived;
            mov.u32 began, %globaltimer_hi;
            bra ask;
            sleep:
            nanosleep.u32 50;
            mov.u32 now, %globaltimer_hi;
            sub.u32 now, now, began;
            setp.gt.u32 late, now, 7;
            @late trap;
            ask:
            ld.acquire.gpu.global.b32 seen, [$1];
            setp.lt.s32 early, seen, $2;
            @early bra sleep;
            arrived:
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [flag, ARRIVALS],
            tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()


@triton.jit
def leave(flag, last):
    """Count a consumer out; the last one, who finds `last` there, leaves a zero behind."""
    tl.debug_barrier()
    if INTERPRETED:
        if tl.atomic_add(flag, 1, sem="acq_rel") == last:
            tl.atomic_xchg(flag, 0, sem="relaxed")
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred first, last;
            .reg .b32 thread, seen;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first atom.acq_rel.gpu.global.add.u32 seen, [$1], 1;
            setp.eq.and.u32 last, seen, $2, first;
            @last st.relaxed.gpu.global.u32 [$1], 0;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [flag, last],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def scaling_of(scaling, pointer):
    """Return the scaling, float32: the number, or what the pointer holds if there is one."""
    if pointer is None:
        return scaling
    else:
        return tl.load(pointer).to(tl.float32)


@triton.jit
def keep_scale(threshold):
    """Return 65536 / (65536 - threshold), the factor of kept elements."""
    return 65536.0 / (65536 - threshold)


@triton.jit
def unit_of(sums):
    """Return a power of two such that float16 holds float32 sums in it, each to its precision.

    The largest finite one is below 2¹⁵ then. Up from there units are as small as that allows, down
    from there they are 1, 2⁻¹⁶, 2⁻³² and so on: near rows have the same. The least is 2⁻⁶⁴, beyond
    float16's products.
    """
    sizes = tl.abs(sums)
    largest = tl.max(tl.max(tl.where(sizes < float("inf"), sizes, 0.0), 1), 0)
    exponent = tl.maximum(largest, 2.0**-50).to(tl.int32, bitcast=True) >> 23
    exponent -= tl.where(exponent < 127 + 15, ((exponent + 2) & 15) - 1, 14)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_of(unit):
    """Return the inverse of powers of two, exactly."""
    return (0x7F000000 - unit.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)

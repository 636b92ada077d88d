"""Device functions: products, and what of them the compiler must not see through."""

import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels import arguments


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the sums that a product begins with: float32 zeros."""
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def plus_product(acc, left, right, MODE: tl.constexpr):
    """Return acc + left right, summed in float32."""
    if left.dtype == tl.float32 and MODE.PRECISION == "ieee":
        # A sum for each step, then their sum: the error grows with the square root of either's
        # length, not of all of K. Without the block Triton would join the two again.
        return acc + settled(tl.dot(left, right, input_precision=MODE.PRECISION))
    else:
        return tl.dot(left, right, acc, input_precision=MODE.PRECISION)


@triton.jit
def settled(product):
    """Return a product, complete: what uses the result comes after the wait for it.

    Triton 3.8 may let a copy overwrite an operand of a pending product (sm_90), and LLVM may move
    reads of tensor memory's registers before the wait (sm_100); neither passes an assembly block.
    """
    if arguments.INTERPRETED:
        return product
    else:
        return tl.inline_asm_elementwise(
            "// $0", "=r,0", [product], tl.float32, is_pure=False, pack=1
        )


@triton.jit
def read(product, MODE: tl.constexpr):
    """Return a product for elementwise use: out of tensor memory, completely, where it is there."""
    if MODE.MMA == "tcgen05":
        return settled(product)
    else:
        return product


@triton.jit
def rounded_now(product, dtype: tl.constexpr):
    """Return a product, complete, in a 16-bit type, before the next one adds to its registers.

    Left to itself LLVM rounds where the result is used, and copies the sums to keep them so long.
    ptxas goes further (12.8 to 13.3): where an asynchronous product adds to the registers, it takes
    an equal rounding after it for this one. So this one rounds a pair the other way round.
    """
    if arguments.INTERPRETED:
        return product.to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2; prmt.b32 $0, $0, $0, 0x1032;",
            "=&r,r,r", [product], tl.bfloat16, is_pure=False, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $2; prmt.b32 $0, $0, $0, 0x1032;",
            "=&r,r,r", [product], tl.float16, is_pure=False, pack=2,
        )  # fmt: skip


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
def apart(left, right):
    """Return left right, float32, rounded: no sum takes it as a fused multiply-add would."""
    if arguments.INTERPRETED:
        return left * right
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [left, right], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def opaque(numbers):
    """Return int32 numbers of which the compiler knows nothing, so that it joins no accesses."""
    if arguments.INTERPRETED:
        return numbers
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [numbers], tl.int32, is_pure=True, pack=1
        )

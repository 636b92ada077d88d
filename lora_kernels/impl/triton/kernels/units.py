"""Device functions: the units that float16's dxa is stored in, or its precision in float32."""

import triton
import triton.language as tl


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


@triton.jit
def eleven_bits(numbers):
    """Return float32 rounded to float16's precision, which is TF32's; its range is float32's."""
    bits = numbers.to(tl.int32, bitcast=True)
    near = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(numbers == numbers, near, numbers)

"""The launch of a shrink by itself, of the split path and of the library plan."""

from typing import NamedTuple

from torch import Tensor

from lora_kernels.impl.triton.kernels.arguments import Factor, ShrinkShape
from lora_kernels.impl.triton.kernels.shrink import shrink_kernel
from lora_kernels.impl.triton.launch import Options, current
from lora_kernels.impl.triton.operands import Operands, as_rows
from lora_kernels.impl.triton.plan.config import ShrinkConfig, padded_rank

_PROGRAMS = 4  # a multiprocessor: few enough to be resident, enough to stream by


class Dxa(NamedTuple):
    """dxa [M, R], of float16 in units, float32, one for each `rows` rows: its range is short."""

    numbers: Tensor
    units: Tensor | None
    rows: int


def shrink(
    v: Tensor, operands: Operands, factor: Tensor, out: Tensor | Dxa, config: ShrinkConfig
) -> None:
    """Launch xa = scaling · D(v) fᵀ or, into a `Dxa`, dxa = scaling · D(v) f."""
    m, executor = v.shape[0], current()
    device = executor.device(v)
    grid = min(-(-m // config.block_m), _PROGRAMS * executor.programs(device))
    transposed = isinstance(out, Tensor)
    numbers, units = (out, None) if isinstance(out, Tensor) else out[:2]
    args = {
        "v": as_rows(v), "f": as_rows(factor), "seed_pointer": operands.seed,
        "scaling_pointer": operands.scaling_pointer, "out": Factor(numbers, units),
        **operands.scalars(m),
    }  # fmt: skip
    shape = shrink_shape(v.shape[1], operands.sizes[2], config, transposed)
    constants = {"SHAPE": shape, "MODE": operands.mode(m, device.mma)}
    executor.run(shrink_kernel, grid, args, constants, Options(config.num_warps, config.num_stages))


def shrink_shape(length: int, r: int, config: ShrinkConfig, transposed: bool) -> ShrinkShape:
    """Return the sizes of a shrink over so many columns, of fᵀ if transposed."""
    return ShrinkShape(
        L=length, R=r, TRANSPOSED=transposed, BLOCK_M=config.block_m, BLOCK_L=config.block_k,
        BLOCK_R=padded_rank(r),
    )  # fmt: skip

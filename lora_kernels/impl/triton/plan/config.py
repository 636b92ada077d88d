"""Tile configurations: what ships, and the one predicate that says which are legal where."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.impl import gpu
from lora_kernels.impl.gpu import MAX_RANK
from lora_kernels.impl.triton.plan.device import Device
from lora_kernels.impl.triton.plan.spill_free import Row, spill_free
from lora_kernels.operands.codebook import CodebookWeight
from lora_kernels.operands.weight import QuantizedWeight

MIN_TILE = 16  # the smallest side of a matrix product
TENSOR_MEMORY_COLUMNS = 512
DESCRIPTOR_ALIGNMENT = 16  # bytes, of addresses and row strides
DESCRIPTOR_STRIDE = 1 << 40  # bytes, beyond every row stride
POINTER_STRIDE = 16  # elements, by which Triton knows strides
MAX_SUM_RANKS = 64
SMALLEST_CHUNK = 64  # of codes that share a scale, in a loop that decodes them


def padded_rank(r: int) -> int:
    """Return the rank padded to a size that a tile may have."""
    return max(MIN_TILE, 1 << (r - 1).bit_length())


def sum_ranks(r: int) -> int:
    """Return how many ranks a tile of dA or dB sums; more would not fit its registers."""
    return min(padded_rank(r), MAX_SUM_RANKS)


def rank_step(r: int, dtype: torch.dtype) -> int:
    """Return how many ranks the last product of a tile takes at a time.

    All of them through tensor cores; float32 operands lie in registers, so few.
    """
    return MIN_TILE if dtype == torch.float32 else padded_rank(r)


class Problem(NamedTuple):
    """One call as the picker sees it: sizes as in y [M, N] = x [M, K] Wᵀ and rank R."""

    m: int
    n: int
    k: int
    r: int
    bits: int  # of x, W, y: 16 or 32
    dropout: bool = False
    aligned: bool = True  # whether tensor descriptors may describe x (or dy) and W
    backward: bool = False
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False)  # dx, dA, dB, dbias
    wide: bool = True  # whether rows of x (or dy) and W start at multiples of 16 elements
    tf32: bool = False  # whether float32 products are TF32's
    form: str = "dense"  # the format of W
    blocksize: int = 0  # of codes that a loop may decode; 0 where it may not
    gain: bool = False  # whether it is DoRA's

    @property
    def block_r(self) -> int:
        """The rank padded to a size that a tile may have."""
        return padded_rank(self.r)

    @property
    def out(self) -> int:
        """Columns of the large result: N of y, or K of dx."""
        return self.k if self.backward else self.n

    @property
    def depth(self) -> int:
        """What the large product sums over: K forward, N backward."""
        return self.n if self.backward else self.k


def problem_of(
    rows: Tensor,
    weight: Tensor | QuantizedWeight,
    a: Tensor,
    dropout: bool,
    needs: Sequence[bool] | None = None,
) -> Problem:
    """Describe a call by its matrices: rows are x, or with backward's `needs` dy.

    A quantised weight counts as what it is decoded to, in memory of its own.
    """
    (n, k), bits = weight.shape, rows.element_size() * 8
    form, blocksize = "dense", 0
    if isinstance(weight, QuantizedWeight):
        form, blocksize = weight.format, _decodable(weight)
        aligned, wide = k * bits % (8 * DESCRIPTOR_ALIGNMENT) == 0, k % POINTER_STRIDE == 0
    else:
        aligned, wide = _describable(weight), _is_wide(weight)
    problem = Problem(
        rows.shape[0], n, k, a.shape[0], bits, dropout,
        aligned=_describable(rows) and aligned,
        wide=_is_wide(rows) and wide,
        tf32=rows.dtype == torch.float32 and gpu.tf32_allowed(),
        form=form, blocksize=blocksize,
    )  # fmt: skip
    if needs is None:
        return problem
    dx, da, db, dbias = needs
    return problem._replace(backward=True, needs=(dx, da, db, dbias))


def _decodable(weight: QuantizedWeight) -> int:
    """Return the block size of codes that a loop can decode, whose rows begin with blocks; or 0."""
    if not isinstance(weight, CodebookWeight) or weight.blocksize < SMALLEST_CHUNK:
        return 0
    aligned = weight.stored.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
    return weight.blocksize if aligned and weight.shape[1] % weight.blocksize == 0 else 0


def _describable(t: Tensor) -> bool:
    """Whether a tensor descriptor can describe the matrix: rows may not overlap, a driver says.

    Source: NVIDIA's documentation of cuTensorMapEncodeTiled, globalStrides.
    """
    stride = t.stride(0) * t.element_size()
    return (
        t.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
        and stride % DESCRIPTOR_ALIGNMENT == 0
        and t.shape[1] * t.element_size() <= stride < DESCRIPTOR_STRIDE
        and t.stride(1) == 1
    )


def _is_wide(t: Tensor) -> bool:
    """Whether Triton knows that rows are aligned: it asks for strides by 16 elements."""
    return (
        t.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
        and t.stride(0) % POINTER_STRIDE == 0
        and t.stride(1) == 1
    )


@dataclass(frozen=True, order=True)
class Config:
    """Tiles of the large product: block_m tokens by block_n columns of y or dx, block_k a step.

    xa_columns: columns of tiles that also make xa (dxa), each over a part of K; 0 is the split
        path, in two launches.
    sum_columns, sum_rows: tiles of dA and dB, columns by rows a step, of the backward kernel only.
    codes: whether W's codes are decoded in the loop.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    xa_columns: int = 1
    descriptors: bool = False
    group: int = 8
    sum_columns: int = 128
    sum_rows: int = 64
    codes: bool = False


@dataclass(frozen=True)
class ShrinkConfig:
    """Tiles of a shrink, the split path's or the library plan's: block_m tokens, block_k a step."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, order=True)
class LibraryConfig:
    """Tiles of the library plan's passes; the library chooses its GEMM's itself.

    block_m, block_n: tokens by columns of y, of the expand.
    sum_columns, sum_rows: tiles of dB, columns by rows a step.
    pass_columns: columns of x and dx that a program takes, sum_rows a step.
    """

    block_m: int
    block_n: int
    expand_warps: int
    sum_columns: int
    sum_rows: int
    sum_warps: int
    pass_columns: int
    pass_warps: int
    pass_stages: int


AnyConfig = Config | LibraryConfig

# Largest first. Which of them serve a rank, in one launch or two, `spill_free` says.
TILES_16 = (
    Config(128, 256, 64, 8, 3),
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 8, 3),
    Config(64, 128, 64, 8, 3),
    Config(128, 64, 64, 8, 3),
    Config(64, 64, 64, 8, 3),
    Config(64, 64, 64, 4, 3),
    Config(32, 64, 64, 4, 4),
    Config(16, 64, 64, 2, 4, sum_columns=64),
    Config(16, 32, 128, 2, 4, sum_columns=64),
)
TILES_32 = (
    Config(64, 64, 32, 8, 3, sum_columns=64, sum_rows=32),
    Config(32, 32, 32, 4, 3, sum_columns=64, sum_rows=32),
    Config(16, 32, 32, 2, 3, sum_columns=64, sum_rows=32),
)


# Of codes decoded in the loop: the more rows a tile has, the less a code costs.
TILES_CODES = (
    Config(256, 128, 64, 8, 3, codes=True),
    Config(128, 128, 64, 8, 3, codes=True),
    Config(64, 128, 64, 8, 3, codes=True),
    Config(64, 64, 64, 4, 3, codes=True),
    Config(16, 64, 64, 2, 4, sum_columns=64, codes=True),
)


# Of DoRA's forward, 16 bits: a few, each of which is compiled to see that it spills nothing.
TILES_DORA = tuple(TILES_16[i] for i in (0, 1, 3, 6, 8))


def shipped(problem: Problem) -> list[Config]:
    """Return every configuration that ships for a layer's kind, legal or not on a given device."""
    found = []
    if problem.gain and not problem.backward:
        for tile, xa_columns, descriptors in product(TILES_DORA, (0, 1), (False, True)):
            found.append(replace(tile, xa_columns=xa_columns, descriptors=descriptors))
        return found if problem.bits == 16 else []
    if problem.blocksize and problem.bits == 16:
        for tile, xa_columns, descriptors in product(TILES_CODES, (0, 1), (False, True)):
            found.append(replace(tile, xa_columns=xa_columns, descriptors=descriptors))
    for tile in TILES_16 if problem.bits == 16 else TILES_32:
        for xa_columns in _xa_columns(problem):
            for descriptors in (False, True):
                found.append(replace(tile, xa_columns=xa_columns, descriptors=descriptors))
    return found


def _xa_columns(problem: Problem) -> tuple[int, ...]:
    """Return how many columns may make xa: more with dropout, which a shrinking tile draws."""
    if problem.backward:
        return 0, 1
    return (0, 1, 2, 4) if problem.dropout else (0, 1, 2)


def shrink_config(problem: Problem, device: Device) -> ShrinkConfig:
    """Return the shrink's tile: few rows, so that many multiprocessors stream.

    Of the rank's tiles those that spill no registers on any architecture (`inspect` says).
    """
    if problem.bits == 32:  # operands lie in registers: the larger the rank, the fewer rows
        most, depth, stages = max(MIN_TILE, min(64, 2048 // problem.block_r)), 32, 2
    else:
        most, depth, stages = 32 if problem.block_r in (16, 256) else 64, 64, 3
    rows = MIN_TILE
    while rows < most and problem.m > 2 * rows * device.multiprocessors:
        rows *= 2
    if problem.block_r == 256:
        depth //= 2
    elif problem.bits == 16 and problem.block_r == 32 and rows > MIN_TILE:
        depth = 128
    # With four warps ptxas gives such small tiles 32 or 72 registers, and spills 8 bytes of dxa's.
    few = problem.bits == 32 and rows == MIN_TILE and problem.block_r <= 64
    return ShrinkConfig(rows, depth, 2 if few else 4, stages)


def library_config(problem: Problem) -> LibraryConfig:
    """Return the tiles of the library plan's passes: sums of all ranks lie in registers."""
    if problem.bits == 32:
        columns = max(MIN_TILE, min(64, 2048 // problem.block_r))
        return LibraryConfig(32, 64, 4, 64, 32, 4, columns, 4, 2)
    columns = min(128, 16384 // problem.block_r)
    return LibraryConfig(64, 128, 4, 128, 64, 4, columns, 8, 2)


def shared_bytes(config: Config, problem: Problem, device: Device) -> int:
    """Return an upper bound of the shared memory that a program needs.

    A buffer holds the operands of one step: both tiles of the large product, and of the shrink
    the factor. Copies alone need stages - 1 buffers, asynchronous products, which still read the
    last one, all of them. A shrink fed by registers puts x there once more.
    """
    size = problem.bits // 8
    asynchronous = device.wgmma or device.tensor_memory
    buffers = config.num_stages if asynchronous else config.num_stages - 1
    step = (config.block_m + config.block_n) * config.block_k
    if config.xa_columns:
        step += problem.block_r * config.block_k
    total = buffers * step * size
    if not problem.backward and config.xa_columns and problem.dropout:
        total += config.block_m * config.block_k * size
    if problem.backward:
        sums = (sum_ranks(problem.r) + config.sum_columns) * config.sum_rows * (buffers + 1)
        total = max(total, sums * size)
    last = MIN_TILE if problem.bits == 32 else problem.block_r
    if problem.depth <= 2 * config.block_k:  # unrolled: a step's operands may lie beside the last
        last += config.block_k
    return max(total, last * (config.block_m + config.block_n) * size) + 2048


def library_alone(problem: Problem, device: Device) -> str | None:
    """Return why the library plan alone serves a layer rightly, or well, on a device; or None."""
    if problem.gain and problem.dropout:
        return "DoRA's D(x) goes through W, too: two products of x"
    if problem.bits == 32 and not problem.tf32:
        return "float32 products on plain cores: the library's GEMM is faster"
    if not problem.aligned:
        return "rows that don't start at multiples of 16 bytes, or columns apart: W would be copied"
    widths = (problem.n, problem.k)
    if not device.descriptors and not (
        problem.wide and all(width % POINTER_STRIDE == 0 for width in widths)
    ):
        return f"rows that aren't multiples of {POINTER_STRIDE} elements: Triton would load words"
    if problem.backward and (problem.dropout or problem.r != problem.block_r):
        # 2026-11-29, an H200, Triton 3.6: docs/facts/gpu.md has what is known.
        return "dx by one launch was wrong on a GPU with dropout, and with a rank that is padded"
    return None


def illegal(config: Config, problem: Problem, device: Device) -> str | None:
    """Return why a configuration can't serve the layer on the device, or None if it can."""
    if not 1 <= problem.r <= MAX_RANK:
        return f"rank {problem.r} is outside 1 to {MAX_RANK}"
    if config.descriptors and not (problem.aligned and problem.bits == 16 and device.descriptors):
        return "tensor descriptors need 16-bit operands, aligned rows and sm_90 or sm_100"
    if config.codes and not (problem.blocksize and problem.bits == 16):
        return "a loop decodes four bits to 16, of rows that begin with blocks of 64 codes or more"
    if config.codes and config.descriptors != device.descriptors:
        return "codes are decoded beside tensor copies where there are any"
    if _multiplies(problem) and not problem.backward and config.descriptors != device.descriptors:
        return "DoRA's forward takes tensor copies where there are any"
    if max(config.block_m, config.block_n) > 128 and not device.wgmma:
        # Elsewhere they spill or leave no room for the shrink; 128 reach as much of the peak.
        return "sides of 256 need asynchronous products with sums in registers (sm_90)"
    columns = -(-problem.out // config.block_n)
    if config.xa_columns > columns:
        return f"{config.xa_columns} xa columns of {columns}"
    if config.xa_columns > device.multiprocessors:
        return "xa columns of one row panel wait for each other and must run together"
    if problem.backward and config.xa_columns > 1:
        return "one column makes dxa"
    steps = -(-problem.depth // config.block_k)
    if config.xa_columns > steps:
        return f"{config.xa_columns} parts of {steps} steps"
    needed = shared_bytes(config, problem, device)
    if needed > device.shared_bytes:
        return f"{needed} bytes of shared memory of {device.shared_bytes}"
    return _registers_exceeded(config, problem, device)


def _registers_exceeded(config: Config, problem: Problem, device: Device) -> str | None:
    if device.tensor_memory and problem.bits == 16:
        # Twice the tile: Triton 3.6 gives the last product sums of its own.
        used = 2 * config.block_n + (problem.block_r if config.xa_columns else 0)
        if used > TENSOR_MEMORY_COLUMNS:
            return f"{used} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}"
    ranks = spill_free().get(compiled_as(config, problem, device), ())
    if problem.block_r not in ranks:
        return f"registers would spill for a padded rank of {problem.block_r}"
    return None


def _multiplies(problem: Problem) -> bool:
    """Whether the forward launch multiplies by DoRA's g: with dropout the library's plan serves."""
    return problem.gain and not problem.dropout


def compiled_as(config: Config, problem: Problem, device: Device) -> Row:
    """Return the row of `spill_free` that a configuration has on a device."""
    target = device.target if device.capability[0] in (9, 10) else 80
    return Row(
        target // 10 * 10,
        "codes" if config.codes else "descriptors" if config.descriptors else "pointers",
        "backward" if problem.backward else "dora" if _multiplies(problem) else "forward",
        problem.bits,
        config.block_m,
        config.block_n,
        config.block_k,
        config.num_warps,
        config.xa_columns,
        int(problem.dropout),
    )

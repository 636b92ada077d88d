"""Tiles of calls of groups: a table by rows of a group, bits of a number, and rank."""

from typing import NamedTuple

from lora_kernels.impl.triton.plan.config import MIN_TILE, padded_rank
from lora_kernels.impl.triton.plan.device import Device


class GroupedProblem(NamedTuple):
    """A call of groups as the table sees it: S sorted rows, weights [N, K] each, rank R."""

    sorted_rows: int
    groups: int
    n: int
    k: int
    r: int
    bits: int  # of x: 16 or 32
    dropout: bool = False

    @property
    def rows(self) -> int:
        """The rows of a group, on average."""
        return -(-self.sorted_rows // max(1, self.groups))


class GroupedConfig(NamedTuple):
    """Tiles: block_m rows of one group by block_n columns of y or dx, block_k a step.

    programs: of a multiprocessor.
    sum_columns, sum_rows: tiles of dA and dB, columns by rows a step.
    group: row panels whose tiles follow each other.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int
    sum_columns: int
    sum_rows: int
    group: int = 8


def grouped_config(problem: GroupedProblem, device: Device) -> GroupedConfig:
    """Return the tiles of a call; half a row panel a group is computed in vain, on average."""
    block_r, most = padded_rank(problem.r), 128
    if problem.bits == 32:
        most = 64 if block_r <= 32 else 32 if block_r <= 64 else MIN_TILE
        rows = _height(problem, 2, most)
        columns = 64 if rows == 64 else 32
        return GroupedConfig(rows, columns, 32, rows // 8, 3, 1, 64, 32)
    # A of many ranks takes shared memory, float32 as it may be, and its sums take registers.
    if block_r > 32:
        most = 64 if block_r < 256 else 32
    depth, stages = (32, 3) if block_r >= 128 else (64, 4)
    rows = _height(problem, 3, most)
    if rows == 128:
        return GroupedConfig(128, 128, 64, 8, 3, 1, 128, 64)
    if rows == 64:
        # Eight warps repeat parts of the shrink, but have registers to draw D, and for ranks.
        few = block_r <= 32 and not problem.dropout
        warps, programs = (4, 2) if few else (8, 1)
        return GroupedConfig(64, 128, depth, warps, 3, programs, 128, 64)
    return GroupedConfig(rows, 64, depth, rows // 8, stages, 2, 64, 64)


def _height(problem: GroupedProblem, panels: int, most: int) -> int:
    """Return the rows of a tile: so few that a group has as many panels, up to a limit."""
    rows = MIN_TILE
    while rows < most and problem.rows > panels * rows:
        rows *= 2
    return rows

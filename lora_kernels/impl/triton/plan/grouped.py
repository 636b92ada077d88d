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
    rows = MIN_TILE
    block_r = padded_rank(problem.r)
    if problem.bits == 32:
        most = 64 if block_r <= 32 else 32 if block_r <= 64 else MIN_TILE
        while rows < most and problem.rows > 2 * rows:
            rows *= 2
        warps = {16: 2, 32: 4, 64: 8}[rows]
        return GroupedConfig(rows, 64 if rows == 64 else 32, 32, warps, 3, 1, 64, 32)
    most = 128 if block_r <= 32 else 64
    while rows < most and problem.rows > 3 * rows:
        rows *= 2
    if rows == 128:
        return GroupedConfig(128, 128, 64, 8, 3, 1, 128, 64)
    if rows == 64:
        return GroupedConfig(64, 128, 64, 4, 3, 2, 128, 64)
    columns, warps = (64, 4) if rows == 32 else (64, 2)
    return GroupedConfig(rows, columns, 64, warps, 4, 2, 64, 64)

"""Which configurations compile without spilling registers: spill_free.csv, a row a kind of kernel.

Written by tools/spill_free.py from what ptxas reports: at most 64 bytes on sm_80, none on sm_90 and
sm_100, whose rows serve the other architectures of their generation; what is neither is taken as
sm_80.
"""

import csv
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import NamedTuple, TextIO

TABLE = "spill_free.csv"


class Row(NamedTuple):
    """A kind of kernel: the columns of the table but for the last, the padded ranks that fit."""

    arch: int
    copies: str  # "descriptors" or "pointers", "codes" where these are decoded beside either
    direction: str  # "forward", of DoRA "dora", or "backward"
    bits: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    xa_columns: int
    dropout: int  # 0 or 1

    def __str__(self) -> str:
        return ",".join(map(str, self))


@cache
def spill_free() -> dict[Row, list[int]]:
    """Return the padded ranks for which each kind of kernel spills nothing."""
    with files(__package__).joinpath(TABLE).open() as file:
        _, *rows = csv.reader(file)
    return {_row(columns): [int(rank) for rank in ranks.split()] for *columns, ranks in rows}


def _row(columns: list[str]) -> Row:
    arch, copies, direction, *numbers = columns
    return Row(int(arch), copies, direction, *map(int, numbers))


def write(file: TextIO, table: Mapping[Row, list[int]]) -> None:
    """Write a table, its rows in order."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow((*Row._fields, "ranks"))
    writer.writerows((*row, " ".join(map(str, table[row]))) for row in sorted(table))

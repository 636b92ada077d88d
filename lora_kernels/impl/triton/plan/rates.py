"""The rates that the cost model predicts with: rates.json, each with its source and a mark.

"any" serves every GPU, "generations" those of a compute capability, "gpus" one by its name; the
last that has a rate counts. `python -m bench.report.rates` writes what a GPU was measured to reach.
Peaks, of which most rates are shares, are the data sheets' in device.py: the unit, not a claim.
"""

import json
import math
import sys
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

TABLE = "rates.json"
MEASURED, PUBLISHED, NOT_MEASURED = MARKS = ("measured", "published", "not measured")
# Whose shares a generation takes that has none, nor has the first of its major number.
OLDEST = "8.9"
MAY_BE_ZERO = ("latency_seconds",)


class Rates(NamedTuple):
    """What a GPU reaches: shares of its peaks, and seconds."""

    gemm: float  # the library's 16-bit GEMMs, of the tensor cores' peak
    gemm_32: float  # its IEEE float32 GEMMs, of the plain cores' peak
    tiles: float  # a factor on our loop's shares, so that the best tile reaches what Triton's does
    streaming: float  # passes over memory, of its bandwidth
    launch_seconds: float  # one launch, beside its products and memory
    pass_seconds: float  # a pass over memory, at least
    latency_seconds: float  # a pass of ours, beside its bytes
    gemm_seconds: float  # a GEMM, beside its products: launch and tail
    tile_seconds: float  # a tile, beside its steps: to fill the pipeline and to store
    step_seconds: float  # a step of the loop, beside its products: barriers
    split_k_seconds: float  # one program's store to the next one's sum: release, poll, load


class Rate(NamedTuple):
    """A number of the table. mark: one of `MARKS`."""

    value: float
    mark: str
    source: str


Table = Mapping[str, Mapping[str, Mapping[str, Rate]]]


def read(text: str) -> dict[str, dict[str, dict[str, Rate]]]:
    """Return the groups of a table: "any" (of one, ""), "generations" and "gpus", by their names.

    Raises:
        ValueError: the text is no such table.
    """
    try:
        data: dict[str, Any] = json.loads(text)
        groups = {
            "any": {"": data["any"]},
            "generations": data["generations"],
            "gpus": data["gpus"],
        }
        return {
            group: {name: _rates(f"{group} {name}", each) for name, each in named.items()}
            for group, named in groups.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"rates: expected any, generations and gpus, got {error!r}") from error


def _rates(where: str, entries: dict[str, dict[str, Any]]) -> dict[str, Rate]:
    found = {}
    for name, entry in entries.items():
        rate = Rate(**entry)
        if name not in Rates._fields:
            raise ValueError(f"{where}: expected some of {', '.join(Rates._fields)}, got {name!r}")
        if rate.mark not in MARKS or not rate.source:
            raise ValueError(f"{where}: {name}: expected a mark and a source, got {rate}")
        least = 0.0 if name in MAY_BE_ZERO else sys.float_info.min
        if not (isinstance(rate.value, int | float) and least <= rate.value < math.inf):
            raise ValueError(f"{where}: {name}: expected a positive number, got {rate.value!r}")
        found[name] = rate
    return found


def written(table: Table) -> str:
    """Return the text of a table."""
    plain: dict[str, Any] = {
        group: {
            name: {rate: each._asdict() for rate, each in rates.items()}
            for name, rates in named.items()
        }
        for group, named in table.items()
    }
    plain["any"] = plain["any"][""]
    return json.dumps(plain, indent=1) + "\n"


@cache
def shipped() -> dict[str, dict[str, dict[str, Rate]]]:
    """Return the table of the package, read once."""
    return read(files(__package__).joinpath(TABLE).read_text())


def entries(table: Table, name: str, capability: tuple[int, int]) -> dict[str, Rate]:
    """Return a GPU's entries of a table, by the names of `Rates`."""
    major, minor = capability
    known = table["generations"]
    generation = next(key for key in (f"{major}.{minor}", f"{major}.0", OLDEST) if key in known)
    return {**table["any"][""], **known[generation], **table["gpus"].get(name, {})}


@cache
def rates_of(name: str, capability: tuple[int, int]) -> Rates:
    """Return what a GPU reaches by the table of the package."""
    return Rates(**{key: rate.value for key, rate in entries(shipped(), name, capability).items()})

"""How time grows with M, N, K and R: slopes on a log scale, of times and of their ratios."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from bench.measure.timing import TIMED
from bench.providers.registry import FLOOR
from bench.shapes import GROWTH, SWEEPS

AXES = tuple(SWEEPS.axes)
LEAST_POINTS = 4
# A slope this far above zero, in its standard errors, is growth.
ERRORS = 2.0


@dataclass(frozen=True)
class Fit:
    """time ~ size ^ slope over a sweep of one size; error: the slope's standard error.

    against_base: the slope of the ratio to the frozen base, which pairs make more exact.
    """

    dtype: str
    p: float
    axis: str
    provider: str
    sizes: list[int]
    ms: list[float]
    slope: float
    error: float
    against_base: float | None = None
    against_error: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the time grows faster than the frozen base's, which knows no R."""
        if self.axis == "r" or self.against_base is None or self.against_error is None:
            return "-"
        return "yes" if self.against_base > ERRORS * self.against_error else "no"


def fits(rows: Iterable[Any]) -> list[Fit]:
    """Return the fits of every sweep that the rows of the layer suite hold, by provider."""
    rows = [row for row in rows if row.case.model == GROWTH and row.state == TIMED]
    kinds = sorted({(row.case.dtype, row.case.p, row.provider) for row in rows})
    found = []
    for axis, (dtype, p, provider) in product(AXES, kinds):
        points = swept(rows, axis, dtype, p, provider)
        if len(points) >= LEAST_POINTS:
            found.append(_fit(axis, points))
    return found


def swept(rows: Iterable[Any], axis: str, dtype: str, p: float, provider: str) -> list[Any]:
    """Return a provider's rows along one axis, by size: the others at the sweeps' common point."""
    kind = dtype, p, provider
    rows = [row for row in rows if (row.case.dtype, row.case.p, row.provider) == kind]
    for other, size in common_point(rows).items():
        if other != axis:
            rows = [row for row in rows if getattr(row.case, other) == size]
    return sorted(rows, key=lambda row: getattr(row.case, axis))


def common_point(rows: Sequence[Any]) -> dict[str, int]:
    """Return the sizes that sweeps along the other axes have, the most frequent of each."""
    return {axis: statistics.mode(getattr(row.case, axis) for row in rows) for axis in AXES if rows}


def _fit(axis: str, rows: Sequence[Any]) -> Fit:
    sizes = [getattr(row.case, axis) for row in rows]
    ms = [row.ms.median for row in rows]
    case, provider = rows[0].case, rows[0].provider
    against: tuple[float | None, float | None] = (None, None)
    if provider != FLOOR and all(row.over_base is not None for row in rows):
        against = slope(sizes, [row.over_base.median for row in rows])
    return Fit(case.dtype, case.p, axis, provider, sizes, ms, *slope(sizes, ms), *against)


def slope(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return the least-squares slope of log(values) over log(sizes) and its standard error."""
    coefficients, covariance = np.polyfit(np.log(sizes), np.log(values), 1, cov=True)
    return float(coefficients[0]), math.sqrt(covariance[0, 0])

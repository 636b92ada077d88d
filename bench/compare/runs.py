"""How far two runs of one suite agree: their ratios, point by point.

    python -m bench.compare.runs FIRST.json SECOND.json

A ratio is a provider's time over PEFT's or the frozen base's. It is quiet where it is marked so in
both runs (`timing.Spread`), and the provider itself took as long in both, within 10 %: elsewhere
the machine was another one. Only of a quiet ratio does a difference say anything.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure.results_file import load
from bench.measure.timing import Spread
from bench.report.tables import case_of

AGREED, SAME_SPEED = 0.05, 0.1
RATIOS = ("over_peft", "over_base", "over_dropout")
FAILED = 1


class Pair(NamedTuple):
    """One ratio in both runs."""

    suite: str
    what: str
    first: float
    second: float
    quiet: bool

    @property
    def apart(self) -> float:
        """How far the second is from the first, as a share of it."""
        return abs(self.second / self.first - 1)


def pairs(first: dict[str, Any], second: dict[str, Any]) -> Iterator[Pair]:
    """Yield the ratios that both files of results hold."""
    for suite, rows in first["rows"].items():
        again = dict(_ratios(second["rows"].get(suite, [])))
        for what, found in _ratios(rows):
            if (other := again.get(what)) is not None:
                (spread, time), (spread_again, time_again) = found, other
                same_speed = abs(time_again / time - 1) <= SAME_SPEED
                quiet = spread.quiet and spread_again.quiet and same_speed
                yield Pair(suite, what, spread.median, spread_again.median, quiet)


def _ratios(rows: list[Any]) -> Iterator[tuple[str, tuple[Spread, float]]]:
    """Yield what a ratio is of, the ratio, and the time above its line."""
    for row in rows:
        for ratio in RATIOS:
            if (spread := getattr(row, ratio, None)) is not None:
                yield f"{_what(row)}, {ratio.replace('_', ' ')}", (spread, _time(row))


def _time(row: Any) -> float:
    if hasattr(row, "ms"):
        return float(row.ms.median)
    return float(row.us if hasattr(row, "us") else row.ns)


def _what(row: Any) -> str:
    if hasattr(row, "provider"):
        return f"{case_of(row)}, {row.provider}"
    return f"{row.call}, {row.mode}" if hasattr(row, "call") else f"{row.threads} threads"


def main(arguments: list[str] | None = None) -> int:
    """Print how far the files agree.

    The status is 1 where a quiet ratio differs by over 5 %, 2 where there is none to compare.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.compare.runs", description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    given = parser.parse_args(arguments)
    try:
        found = list(pairs(load(given.first), load(given.second)))
    except (OSError, ValueError) as error:
        print(f"python -m bench.compare.runs: error: {error}", file=sys.stderr)
        return 2
    for suite in dict.fromkeys(pair.suite for pair in found):
        own = [pair for pair in found if pair.suite == suite]
        print(f"{suite}: {_summary(own)}; quiet: {_summary([p for p in own if p.quiet])}")
    if not any(pair.quiet for pair in found):
        print(
            "python -m bench.compare.runs: error: no ratio is quiet in both files", file=sys.stderr
        )
        return 2
    far = sorted((p for p in found if p.quiet and p.apart > AGREED), key=lambda p: -p.apart)
    for pair in far:
        print(f"  {pair.suite}, {pair.what}: {pair.first:.3f}, then {pair.second:.3f}")
    return FAILED if far else 0


def _summary(found: list[Pair]) -> str:
    if not found:
        return "0 ratios"
    within = sum(pair.apart <= AGREED for pair in found)
    middle = statistics.median(pair.apart for pair in found)
    return f"{within} of {len(found)} ratios within {AGREED:.0%}, the middle one {middle:.1%} apart"


if __name__ == "__main__":
    sys.exit(main())

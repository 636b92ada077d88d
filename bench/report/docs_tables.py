"""The measured tables of docs/benchmarks.md, written from a file of results.

    python -m bench.report.docs_tables bench/results/<file>.json

The tables stand between two comments, of which the first names the file.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.measure.environment import machine_name
from bench.measure.footprint import MIB
from bench.measure.results_file import load
from bench.measure.timing import LOUD_MARK, TIMED, Spread
from bench.report.growth import Fit, fits
from bench.shapes import TARGETS, how_kept
from bench.suites.overhead import GRAD, NO_GRAD

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
BLOCK = re.compile(r"<!-- measured: (\S+) -->\n.*?<!-- measured ends -->", re.DOTALL)
# What may be a column of the tables: a provider's time over PEFT's.
COLUMNS = {
    "addmm": "addmm",
    "compile": "compiled",
    "cpu": "ours",
    "packed": "packed",
    "base": "frozen base",
}


def main(arguments: list[str] | None = None) -> int:
    """Write the block anew and return an exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report.docs_tables", description=__doc__)
    parser.add_argument("results", type=Path, help="a file below the repository's root")
    given = parser.parse_args(arguments)
    try:
        PAGE.write_text(with_block(PAGE.read_text(), given.results))
    except (OSError, ValueError) as error:
        print(f"python -m bench.report.docs_tables: error: {error}", file=sys.stderr)
        return 2
    return 0


def with_block(text: str, results: Path) -> str:
    """Return the page's text with the block of a results file.

    Raises:
        ValueError: the text has no such block, or the file has no results for it.
    """
    if not BLOCK.search(text):
        raise ValueError(f"docs/benchmarks.md: expected a block like {BLOCK.pattern!r}, got none")
    name = results.resolve().relative_to(ROOT).as_posix()
    heading, *tables = block(load(results), name)
    if not tables:
        raise ValueError(f"{name}: expected rows for the tables, got none")
    body = "\n".join([heading, *tables])
    replaced = f"<!-- measured: {name} -->\n{body}\n<!-- measured ends -->"
    return BLOCK.sub(lambda _: replaced, text, count=1)


def block(data: dict[str, Any], name: str) -> Iterator[str]:
    """Yield the block's lines: where it was measured, and a table of each suite."""
    run, rows = data["run"], data["rows"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "peft"))
    yield f"{machine_name(run)}, {versions}, {run['date'][:10]} ([all figures](../{name}))."
    layers = [row for row in rows.get("layer", []) if row.state == TIMED]
    targets = [row for row in layers if row.case.model == TARGETS]
    if targets:
        yield from ("", *_layer_table(targets))
    steps = [row for row in rows.get("step", []) if row.state == TIMED]
    if steps := [row for row in steps if not how_kept(row.case)]:
        yield from ("", *_step_table(steps))
    if grown := fits(layers):
        yield from ("", *_growth_table(grown))
    if calls := [row for row in rows.get("overhead", []) if not row.reason]:
        yield from ("", *_calls(calls, rows.get("mask", [])))
    if saved := [row for row in rows.get("memory", []) if _single(row)]:
        yield from _saved(saved)


def _layer_table(rows: Sequence[Any]) -> Iterator[str]:
    names = _timed(rows)
    heads = (COLUMNS[name] for name in names)
    yield from _head("forward + backward, r = 16 (M x N x K)", "PEFT, ms", *heads)
    for by_name in _by_case(rows):
        case = by_name["peft"].case
        size = f"{case.m}x{case.n}x{case.k}"
        yield _line(f"{_dtypes(case)} {size}, p = {case.p:g}", *_times(by_name, names))


def _step_table(rows: Sequence[Any]) -> Iterator[str]:
    names = _timed(rows)
    heads = (COLUMNS[name] for name in names)
    yield from _head("training step", "PEFT, ms", *heads, "peak MiB: PEFT, ours")
    for by_name in _by_case(rows):
        case = by_name["peft"].case
        peaks = (f"{by_name[name].peak_bytes / MIB:.0f}" for name in ("peft", "cpu"))
        yield _line(f"{_dtypes(case)}, p = {case.p:g}", *_times(by_name, names), ", ".join(peaks))


def _timed(rows: Sequence[Any]) -> list[str]:
    there = {row.provider for row in rows}
    return [name for name in COLUMNS if name in there]


def _growth_table(grown: Sequence[Fit]) -> Iterator[str]:
    p = max(fit.p for fit in grown)
    chosen = [fit for fit in grown if fit.p == p and fit.dtype == grown[0].dtype]
    axes = list(dict.fromkeys(fit.axis for fit in chosen))
    title = f"slope of log time, {grown[0].dtype}, p = {p:g}, over log"
    yield from _head(title, *(axis.upper() for axis in axes))
    for name, what in {"peft": "PEFT", **COLUMNS}.items():
        slopes = {fit.axis: f"{fit.slope:.2f}" for fit in chosen if fit.provider == name}
        if slopes:
            yield _line(what, *(slopes[axis] for axis in axes))


def _calls(rows: Sequence[Any], masks: Sequence[Any]) -> Iterator[str]:
    us = {(row.call, row.mode): f"{row.us:.1f}" for row in rows}
    names = ("lora_linear", "cpu", "peft")
    function, patched, peft = ([us[name, mode] for mode in (NO_GRAD, GRAD)] for name in names)
    yield "A tiny forward (1 x 64 x 64) takes, without gradient and with:"
    yield f"{' and '.join(function)} µs by `lora_linear`, {' and '.join(patched)} through a patched"
    yield f"layer, {' and '.join(peft)} by PEFT."
    for mask in masks:
        threads = f"{mask.threads} thread{'s' if mask.threads > 1 else ''}"
        yield f"The dropout mask takes {mask.ns:.2f} ns an element on {threads},"
        yield f"{mask.over_dropout.median:.2f} of `F.dropout`'s time."


def _single(row: Any) -> bool:
    return row.case.model == TARGETS and row.saved_bytes is not None


def _saved(rows: Sequence[Any]) -> Iterator[str]:
    yield f"Kept for backward beyond x and the parameters, K = {rows[0].case.k}, in units of x:"
    parts = []
    for by_name in _by_case(rows):
        case = by_name["peft"].case
        ours, peft = (by_name[name].saved_bytes / by_name[name].x_bytes for name in ("cpu", "peft"))
        parts.append(f"{case.dtype}, p = {case.p:g}: {ours:.3f}, PEFT {peft:.3f}")
    yield "; ".join(parts) + "."


def _by_case(rows: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of each case, by provider; a case that PEFT wasn't timed on has none."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(repr(row.case), {})[row.provider] = row
    yield from (by_name for by_name in found.values() if "peft" in by_name)


def _times(by_name: dict[str, Any], names: Sequence[str]) -> list[str]:
    ratios = (by_name[name].over_peft if name in by_name else None for name in names)
    return [f"{by_name['peft'].ms.median:.1f}", *map(_marked, ratios)]


def _marked(ratio: Spread | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio.median:.2f}" if ratio.quiet else f"{ratio.median:.2f} {LOUD_MARK}"


def _dtypes(case: Any) -> str:
    return case.dtype if case.adapters == case.dtype else f"{case.dtype}, {case.adapters} adapters"


def _head(*cells: str) -> Iterator[str]:
    yield _line(*cells)
    yield "|---" * len(cells) + "|"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())

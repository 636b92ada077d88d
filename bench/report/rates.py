"""What a GPU was measured to reach, for the table that the planner predicts with.

    python -m bench.report.rates bench_results/gpu-day-.../plans/results.json [--write]

The file is one of `python -m bench --suite layer --shapes plans` on that GPU. Rates are those with
which the cost model comes nearest to the times of the frozen layer, of the library plan and of one
launch; `--write` puts them into rates.json, marked as measured.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure.environment import machine_name
from bench.measure.results_file import load
from bench.measure.timing import TIMED
from bench.providers.registry import FLOOR, LIBRARY, ONE_LAUNCH
from bench.shapes import DENSE
from lora_kernels.impl.triton.plan import rates
from lora_kernels.impl.triton.plan.config import LibraryConfig, Problem
from lora_kernels.impl.triton.plan.cost import frozen_seconds, library_seconds, seconds
from lora_kernels.impl.triton.plan.device import KNOWN, Device, known
from lora_kernels.impl.triton.plan.plan import fastest_config, plan
from lora_kernels.impl.triton.plan.rates import Rate, Rates

PATH = Path(rates.__file__).with_name(rates.TABLE)
DIGITS = 3
# What whose times decide: GEMMs and passes together, since the frozen layer of few rows is both.
DECIDE = {
    (FLOOR, LIBRARY): ("gemm", "gemm_seconds", "streaming", "latency_seconds"),
    (ONE_LAUNCH,): ("tiles", "launch_seconds"),
}
# Seconds beside bytes and products differ by direction: a sum of both doesn't tell them.
SHARES = ("gemm", "streaming", "tiles")
# Shares of a peak that no GPU reaches, or that only a mistake in units does.
LEAST_SHARE, MOST_SHARE = 0.02, 1.2
FIRST_STEP, LAST_STEP = 2.0, 1.001
SMALLEST_SECONDS = 1e-7  # where a search among factors starts from nothing
LINE = "{:<36}{:>12}{:>12}{:>12}"


class Sample(NamedTuple):
    """One row: who took how many seconds for which passes of a layer."""

    provider: str
    problems: tuple[Problem, ...]
    seconds: float

    def predicted(self, device: Device, run: Device) -> float:
        """Return what the cost model says; tiles are those that the device planned for took."""
        return sum(_predicted(self.provider, problem, device, run) for problem in self.problems)


def _predicted(provider: str, problem: Problem, device: Device, run: Device) -> float:
    if provider == FLOOR:
        return frozen_seconds(problem, device)
    config = fastest_config(problem, run) if provider == ONE_LAUNCH else None
    if config is None:
        return library_seconds(problem, device)
    return seconds(config, problem, device)


class Measured(NamedTuple):
    """A file's measurement: of which GPU, what, and where it is to be looked up."""

    device: Device
    samples: list[Sample]
    source: str


def measured(path: Path) -> Measured:
    """Read a file of results.

    Raises:
        OSError: there is no such file.
        ValueError: it is none of results, holds no measurement, or is not of a GPU of the table.
    """
    data = load(path)
    try:
        run, rows = data["run"], data["rows"].get("layer", [])
        gpu, versions = run["machine"].get("gpu"), run["versions"]
        with_torch = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton"))
        source = f"{path.name}, {run['date'][:10]}, {with_torch}"
        if gpu is None:
            raise ValueError(f"{path}: expected times of a GPU, got those of {machine_name(run)}")
        samples = [sample for row in rows if (sample := _sample(row)) is not None]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected results of the layer suite, got {error!r}") from error
    if gpu not in {device.name for device in KNOWN}:
        raise ValueError(f"{path}: expected a GPU of plan/device.py, got {gpu!r}: add its peaks")
    if not samples:
        names = ", ".join((FLOOR, LIBRARY, ONE_LAUNCH))
        raise ValueError(f"{path}: expected timed rows of {names} in 16 bits, got none")
    for sample in samples:
        if not 0 < sample.seconds < math.inf:
            raise ValueError(f"{path}: expected positive times, got {sample}")
    return Measured(known(gpu), samples, source)


def _sample(row: Any) -> Sample | None:
    """Return a timed row of what decides; None of others."""
    case = row.case
    names = {name for group in DECIDE for name in group}
    if row.state != TIMED or row.provider not in names or getattr(case, "base", DENSE) != DENSE:
        return None
    if case.dtype == "fp32":
        return None
    forward = Problem(case.m, case.n, case.k, case.r, 16, case.p > 0)
    both = (forward, forward._replace(backward=True))
    return Sample(row.provider, both if case.mode == "train" else both[:1], row.ms.median / 1e3)


def fitted(found: Measured) -> dict[str, float]:
    """Return the rates that a measurement decides, by name; others stay as they are.

    Raises:
        ValueError: a share that no GPU reaches: the file's times are no times of such calls.
    """
    was, new = found.device.rates, found.device.rates
    decided: list[str] = []
    for providers, names in DECIDE.items():
        samples = [sample for sample in found.samples if sample.provider in providers]
        if {sample.provider for sample in samples} == set(providers):
            new = _nearest(new, names, partial(_distance, found.device, samples))
            told = any(len(sample.problems) == 1 for sample in samples)
            decided += [name for name in names if told or name in SHARES]
    if not decided:
        raise ValueError(f"rows: expected those of {FLOOR} and {LIBRARY}, or of {ONE_LAUNCH}")
    rounded = {name: float(f"{getattr(new, name):.{DIGITS}g}") for name in decided}
    for name in rounded.keys() & SHARES:
        if not LEAST_SHARE <= rounded[name] <= MOST_SHARE:
            raise ValueError(
                f"{name}: expected {LEAST_SHARE} to {MOST_SHARE} of {found.device.name}'s peak, "
                f"got {rounded[name]} (it was {getattr(was, name)})"
            )
    return rounded


def _distance(device: Device, samples: Sequence[Sample], reached: Rates) -> float:
    """Return the sum of squared logarithms of predicted over measured."""
    by = replace(device, reached=reached)
    return sum(math.log(s.predicted(by, device) / s.seconds) ** 2 for s in samples)


def _nearest(start: Rates, names: Sequence[str], distance: Callable[[Rates], float]) -> Rates:
    """Return the rates at the least distance: one is changed at a time, by ever smaller factors."""
    small = {n: SMALLEST_SECONDS for n in names if getattr(start, n) == 0}
    best, step = start._replace(**small), FIRST_STEP
    least = distance(best)
    while step > LAST_STEP:
        before = least
        for name in names:
            for factor in (step, 1 / step):
                tried = best._replace(**{name: getattr(best, name) * factor})
                if (far := distance(tried)) < least:
                    best, least = tried, far
        if least == before:
            step = math.sqrt(step)
    return best


def lines(found: Measured, new: Mapping[str, float]) -> Iterator[str]:
    """Yield old and new rates, times predicted by both over what was measured, and the choices."""
    device = found.device
    renewed = replace(device, reached=device.rates._replace(**new))
    yield LINE.format(device.name, "old", "new", "")
    for name, rate in new.items():
        yield LINE.format(f"  {name}", f"{getattr(device.rates, name):g}", f"{rate:g}", "")
    yield LINE.format("predicted over measured", "old", "new", "us")
    for s in found.samples:
        by_both = (f"{s.predicted(by, device) / s.seconds:.2f}" for by in (device, renewed))
        yield LINE.format(f"  {_what(s)}", *by_both, f"{s.seconds * 1e6:.0f}")
    changed = 0
    for problem in dict.fromkeys(problem for s in found.samples for problem in s.problems):
        old, now = (_plan_of(problem, by) for by in (device, renewed))
        if old != now:
            changed += 1
            yield f"  {_call(problem)}: {old} -> {now}"
    yield f"choices that change: {changed}"


def _what(sample: Sample) -> str:
    kind = "both" if len(sample.problems) == 2 else "forward"
    m, n, k = sample.problems[0][:3]
    dropout = ", p > 0" if sample.problems[0].dropout else ""
    return f"{m}x{n}x{k} {sample.provider}, {kind}{dropout}"


def _call(problem: Problem) -> str:
    direction = "backward" if problem.backward else "forward"
    return f"{'x'.join(map(str, problem[:3]))} {direction}{', p > 0' * problem.dropout}"


def _plan_of(problem: Problem, device: Device) -> str:
    return "library" if isinstance(plan(problem, device).config, LibraryConfig) else "one launch"


def renewed_table(text: str, found: Measured, new: Mapping[str, float]) -> str:
    """Return a table's text with new rates of a GPU, marked as measured."""
    table = rates.read(text)
    entries = {name: Rate(rate, rates.MEASURED, found.source) for name, rate in new.items()}
    table["gpus"].setdefault(found.device.name, {}).update(entries)
    return rates.written(table)


def main(arguments: list[str] | None = None) -> int:
    """Print old and new rates, write them if so asked, and return an exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report.rates", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("results", type=Path, help="a file of results of the layer suite")
    parser.add_argument("--gpu", help="refuse the file of another GPU than this one")
    parser.add_argument("--write", action="store_true", help="into --table")
    parser.add_argument("--table", type=Path, default=PATH, help="default: the package's")
    given = parser.parse_args(arguments)
    try:
        found = measured(given.results)
        if given.gpu not in (None, found.device.name):
            raise ValueError(f"--gpu: expected times of {given.gpu}, got {found.device.name}'s")
        new = fitted(found)
        text = renewed_table(given.table.read_text(), found, new)
    except (OSError, ValueError) as error:
        print(f"python -m bench.report.rates: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(found, new)))
    if given.write:
        given.table.write_text(text)
        print(f"written to {given.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

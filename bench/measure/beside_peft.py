"""Calls of one kind by PEFT and by others, forward and backward; on a CPU.

Calls are interleaved and ratios to PEFT's time are formed round by round; whose results differ from
PEFT's isn't timed. Peaks are taken in a process of its own.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.measure.footprint import MIB, Probe, peak_bytes
from bench.measure.timing import Meter, Spread

FROZEN, PEFT, OURS = "frozen", "peft", "ours"  # names of providers that every suite has
CLOSE = {"fp32": 1e-4, "bf16": 4e-2}  # of a result's largest element
LINE = "  {:<28}{:>10}{:>22}{:>12}{:>8}"


class Case(Protocol):
    """What is measured, a dataclass; limit: what ours may take of PEFT's time."""

    name: str
    dtype: str
    limit: float | None


class Call(Protocol):
    """One provider's forward and backward; all providers' have the same numbers."""

    def results(self) -> list[Tensor]:
        """Return y and the gradients."""

    def __call__(self) -> None:
        """Run the call and drop what it returns."""


@dataclass(frozen=True)
class Suite:
    """Cases with their limits in float32 and bfloat16 (None: none was set), and who computes them.

    make: (case, provider) -> its call, a function that other processes can import. labels: the
    providers, PEFT's among them.
    """

    limits: tuple[tuple[Any, float | None, float | None], ...]
    make: Callable[[Any, str], Call]
    labels: dict[str, str]

    def cases(self, names: Sequence[str], dtypes: Sequence[str]) -> list[Any]:
        """Return the cases of names and dtypes."""
        return [
            replace(case, dtype=dtype, limit=fp32 if dtype == "fp32" else bf16)
            for case, fp32, bf16 in self.limits
            if case.name in names
            for dtype in dtypes
        ]

    def measure(self, case: Case, seconds: float, probe: Probe) -> Iterator[str]:
        """Yield a line for each provider: time, ratio to PEFT's, peak, limit."""
        calls = {name: self.make(case, name) for name in self.labels}
        expected = calls[PEFT].results()
        for name in [name for name in calls if name not in (FROZEN, PEFT)]:
            apart = farthest(calls[name].results(), expected)
            if not apart <= CLOSE[case.dtype]:
                yield f"  {self.labels[name]:<28}wrong: {apart:.1e} from PEFT's"
                del calls[name]
        times, _ = Meter(seconds).rounds([list(calls.values())])
        columns = dict(zip(calls, zip(*times, strict=True), strict=True))
        for name, column in columns.items():
            ratio = "" if name == PEFT else str(Spread.of_ratios(column, columns[PEFT]))
            peak = probe.run(peak_of, self.make, case, name) / MIB
            limit = f"<={case.limit:.2f}" if name == OURS and case.limit else ""
            ms = f"{Spread.of(column).median:.2f}"
            yield LINE.format(self.labels[name], ms, ratio, f"{peak:.1f}", limit)

    def main(self, program: str, description: str | None, arguments: list[str] | None) -> int:
        """Measure, print, and return an exit status."""
        parser = argparse.ArgumentParser(prog=program, description=description)
        names = list(dict.fromkeys(case.name for case, *_ in self.limits))
        parser.add_argument("--shapes", nargs="+", choices=names, default=names)
        parser.add_argument("--dtype", nargs="+", choices=CLOSE, default=["fp32"])
        parser.add_argument("--seconds", type=float, default=20.0, help="for each case")
        parser.add_argument("--threads", type=int, default=1)
        given = parser.parse_args(arguments)
        torch.set_num_threads(given.threads)
        probe = Probe("cpu")
        try:
            for case in self.cases(given.shapes, given.dtype):
                print(f"\n{case}", LINE.format("", "ms", "/ PEFT", "peak MiB", "limit"), sep="\n")
                for line in self.measure(case, given.seconds, probe):
                    print(line, flush=True)
        finally:
            probe.close()
        return 0


def farthest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of results, in units of each result's largest element."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def peak_of(make: Callable[[Any, str], Call], case: Case, name: str) -> int:
    """Return what a provider's call adds at most to the memory in use."""
    call = make(case, name)
    call()
    return peak_bytes(call, "cpu")

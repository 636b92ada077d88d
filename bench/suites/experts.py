"""Blocks of a mixture's experts, forward and backward, by PEFT and by others; on a CPU.

    python -m bench.suites.experts --shapes qwen3 --dtype fp32

Sizes are small relatives of known models'. Calls are interleaved and ratios to PEFT's time are
formed round by round; whose results differ from PEFT's isn't timed. Peaks are taken in a process of
its own.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from bench.measure.footprint import MIB, Probe, peak_bytes
from bench.measure.timing import Meter, Spread
from bench.providers.experts import FROZEN, LABELS, OURS, PEFT, Call, ExpertsCase

# Limits are those of one thread, float32 and bfloat16 (None: none was set).
LIMITS: tuple[tuple[ExpertsCase, float | None, float | None], ...] = (
    (ExpertsCase("qwen3", 64, 8, 512, 192, 512, "fp32"), 0.29, 0.45),
    (ExpertsCase("qwen3, many rows", 64, 8, 512, 192, 2048, "fp32"), 0.42, 0.64),
    (ExpertsCase("qwen3, few rows", 64, 8, 512, 192, 16, "fp32"), 0.12, 0.23),
    (ExpertsCase("gpt-oss", 32, 4, 720, 720, 512, "fp32", kind="gpt-oss"), 0.30, 0.32),
    (ExpertsCase("mixtral", 8, 2, 512, 1792, 1024, "fp32"), 0.32, 0.62),
)
CLOSE = {"fp32": 1e-4, "bf16": 4e-2}  # of a result's largest element
LINE = "  {:<28}{:>10}{:>22}{:>12}{:>8}"


def cases(names: Sequence[str], dtypes: Sequence[str]) -> list[ExpertsCase]:
    """Return the cases of shape names and dtypes."""
    return [
        replace(case, dtype=dtype, limit=fp32 if dtype == "fp32" else bf16)
        for case, fp32, bf16 in LIMITS
        if case.name in names
        for dtype in dtypes
    ]


def farthest(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of results, in units of each result's largest element."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def measure(case: ExpertsCase, seconds: float, probe: Probe) -> Iterator[str]:
    """Yield a line for each provider: time, ratio to PEFT's, peak, limit."""
    calls = {name: Call(case, name) for name in LABELS}
    expected = calls[PEFT].results()
    for name in [name for name in calls if name not in (FROZEN, PEFT)]:
        apart = farthest(calls[name].results(), expected)
        if not apart <= CLOSE[case.dtype]:
            yield f"  {LABELS[name]:<28}wrong: {apart:.1e} from PEFT's"
            del calls[name]
    times, _ = Meter(seconds).rounds([list(calls.values())])
    columns = dict(zip(calls, zip(*times, strict=True), strict=True))
    for name, column in columns.items():
        ratio = "" if name == PEFT else str(Spread.of_ratios(column, columns[PEFT]))
        peak = probe.run(peak_of, case, name) / MIB
        limit = f"<={case.limit:.2f}" if name == OURS and case.limit else ""
        ms = f"{Spread.of(column).median:.2f}"
        yield LINE.format(LABELS[name], ms, ratio, f"{peak:.1f}", limit)


def peak_of(case: ExpertsCase, name: str) -> int:
    """Return what a provider's call adds at most to the memory in use."""
    call = Call(case, name)
    call()
    return peak_bytes(call, "cpu")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and return an exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.suites.experts", description=__doc__)
    names = [case.name for case, *_ in LIMITS]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--dtype", nargs="+", choices=CLOSE, default=["fp32"])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each case")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    probe = Probe("cpu")
    try:
        for case in cases(given.shapes, given.dtype):
            print(f"\n{case}", LINE.format("", "ms", "/ PEFT", "peak MiB", "limit"), sep="\n")
            for line in measure(case, given.seconds, probe):
                print(line, flush=True)
    finally:
        probe.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How the benchmarks measure on the CPU: interleaved calls, and a probe for a quiet machine.

With 1 thread the clock is the thread's CPU time, which other processes hardly disturb. With more it
is wall time, and one busy core makes every parallel region wait for milliseconds: so a round counts
only if a probe before and after it finds the machine quiet.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lora_kernels.info import describe

MIN_ROUNDS = 7
# With several threads a case ends after this many times its seconds, however few rounds counted.
PATIENCE = 5
# The probe outlasts a scheduler slice. With one of two cores taken by another process it accepted
# 0 rounds of 40 (39 when quiet), where five calls, 0.1 ms, accepted 25.
PROBE_SECONDS, PROBE_LIMIT = 5e-3, 1e-3


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the ratios of two columns, formed round by round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float], reference: Sequence[float]) -> "Ratio":
        ratios = [ours / theirs for ours, theirs in zip(times, reference, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


class Meter:
    """Times interleaved calls for some seconds, by the clock that suits the number of threads."""

    def __init__(self, seconds: float) -> None:
        self.threads, self.seconds = torch.get_num_threads(), seconds
        self.clock = time.thread_time if self.threads == 1 else time.perf_counter
        # Large enough to be split between threads, small enough to take about 20 µs.
        self.probed = torch.ones(200_000)

    def rounds(
        self, slots: Sequence[Sequence[Callable[[], object]]]
    ) -> tuple[list[list[float]], int]:
        """Return the ms of each call of a slot, by round, and how many rounds were rejected."""
        for calls in slots:
            self._time(calls, first=0)
        accepted: list[list[float]] = []
        tried, start = 0, time.perf_counter()
        while self._wants_more(len(accepted), time.perf_counter() - start):
            calls = slots[tried // len(slots[0]) % len(slots)]
            if self._quiet():
                times = self._time(calls, first=tried % len(calls))
                if self._quiet():
                    accepted.append(times)
            tried += 1
        return accepted, tried - len(accepted)

    def _wants_more(self, accepted: int, elapsed: float) -> bool:
        if elapsed < self.seconds:
            return True
        return accepted < MIN_ROUNDS and (self.threads == 1 or elapsed < PATIENCE * self.seconds)

    def _time(self, calls: Sequence[Callable[[], object]], first: int) -> list[float]:
        """Time each call once, beginning with another one each round."""
        times = [0.0] * len(calls)
        for index in (*range(first, len(calls)), *range(first)):
            start = self.clock()
            calls[index]()
            times[index] = 1e3 * (self.clock() - start)
        return times

    def _quiet(self) -> bool:
        """Whether parallel regions meet no busy core now; always with one thread."""
        if self.threads == 1:
            return True
        for _ in range(3):  # sleeping workers wake
            self.probed.mul_(1.0)
        end = time.perf_counter() + PROBE_SECONDS
        while (start := time.perf_counter()) < end:
            self.probed.mul_(1.0)
            if time.perf_counter() - start > PROBE_LIMIT:
                time.sleep(PROBE_SECONDS)
                return False
        return True


def describe_run() -> dict[str, Any]:
    """Say where, when, and with which versions and implementations the numbers are taken."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "machine": {
            "cpu": models[0] if models else platform.processor(),
            "cores": os.cpu_count(),
            "isa": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "peft", "lora_kernels")},
        },
        "implementations": describe().splitlines(),
        "revision": _git_revision(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _git_revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        git = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        return "unknown"
    return git.stdout.strip()

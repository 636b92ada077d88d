"""How the benchmarks measure: interleaved calls, timed by the device's own clock.

On a GPU events around each call time it, its L2 cache overwritten before. On a CPU with 1 thread
the clock is the thread's CPU time, which other processes hardly disturb. With more it is wall time,
and one busy core makes every parallel region wait for milliseconds: so a round counts only if a
probe before and after it finds the machine quiet.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bench.measure.environment import cache_bytes

# Quartiles 4 % apart then leave 1.4 % of doubt in the median (McGill's notches, 95 %).
MIN_ROUNDS = 20
# With several threads a case ends after this many times its seconds if most rounds didn't count.
PATIENCE = 5
# The probe outlasts a scheduler slice. With one of two cores taken by another process it accepted
# 0 rounds of 40 (39 when quiet), where five calls, 0.1 ms, accepted 25.
PROBE_SECONDS, PROBE_LIMIT = 5e-3, 1e-3
FLUSHED_CACHES = 2  # what is written before each call on a GPU, in sizes of its L2 cache
WARM_UPS = 3  # before a capture, as torch asks
TIMED, BUSY = "timed", "busy machine"
# Quartiles of a ratio further apart than this share of it say that the machine wasn't quiet, and so
# do medians of its two halves further apart than half of that: few rounds may lie close by luck. At
# 0.05 8 of 1,559 ratios differed by more than 5 % between two runs, at 0.04 1 of 1,172.
QUIET, LOUD_MARK = 0.04, "~"

# The calls of all providers on one set of tensors; several sets are rotated.
Slot = Sequence[Callable[[], Any]]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles; drift: by what share the medians of both halves in time differ."""

    median: float
    low: float
    high: float
    drift: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise two values or more."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        half = len(values) // 2
        early, late = statistics.median(values[:half]), statistics.median(values[half:])
        return cls(median, low, high, abs(late - early) / median)

    @classmethod
    def of_ratios(cls, times: Sequence[float], reference: Sequence[float]) -> "Spread":
        """Summarise the ratios of two columns, formed round by round."""
        return cls.of([ours / theirs for ours, theirs in zip(times, reference, strict=True)])

    @property
    def quiet(self) -> bool:
        """Whether the quartiles of a ratio are near each other, and so are its two halves."""
        return self.high - self.low <= QUIET * self.median and self.drift <= QUIET / 2

    def __str__(self) -> str:
        mark = "" if self.quiet else f" {LOUD_MARK}"
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f}){mark}"


def compared(columns: Mapping[str, Sequence[float]], name: str, other: str) -> Spread | None:
    """Return the ratios of a column to another, or None where that is itself or not there."""
    if other == name or other not in columns:
        return None
    return Spread.of_ratios(columns[name], columns[other])


class Clock(Protocol):
    """Times the calls of slots, by round."""

    def prepare(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return a call as it will be timed; raises RuntimeError where that can't be."""
        ...

    def rounds(self, slots: Sequence[Slot]) -> tuple[list[list[float]], int]:
        """Return the ms of each call, by round, and how many rounds were rejected."""
        ...


def staggered(slots: Sequence[Slot], turn: int) -> list[Callable[[], Any]]:
    """Return one call of each provider, each on another slot's tensors than its neighbour's.

    So none finds in cache what the one before it has read.
    """
    return [slots[(turn + index) % len(slots)][index] for index in range(len(slots[0]))]


def in_turn(count: int, first: int) -> Iterable[int]:
    """Return the order of a round's calls: another one comes first each time."""
    return (*range(first, count), *range(first))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Meter:
    """Times interleaved calls for some seconds, by the clock that suits the number of threads."""

    def __init__(self, seconds: float) -> None:
        self.threads, self.seconds = torch.get_num_threads(), seconds
        self.clock = time.thread_time if self.threads == 1 else time.perf_counter
        # Large enough to be split between threads, small enough to take about 20 µs.
        self.probed = torch.ones(200_000)

    def prepare(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return the call: it is timed as it is."""
        return call

    def rounds(self, slots: Sequence[Slot]) -> tuple[list[list[float]], int]:
        """Return the ms of each call, by round, and how many rounds were rejected."""
        for calls in slots:
            self._time(calls, first=0)
        accepted: list[list[float]] = []
        tried, start = 0, self.clock()
        while self._wants_more(len(accepted), tried, self.clock() - start):
            calls = staggered(slots, tried)
            if self._quiet():
                times = self._time(calls, first=tried % len(calls))
                if self._quiet():
                    accepted.append(times)
            tried += 1
        return accepted, tried - len(accepted)

    def _wants_more(self, accepted: int, tried: int, elapsed: float) -> bool:
        if elapsed < self.seconds:
            return True
        patient = self.threads == 1 or elapsed < PATIENCE * self.seconds
        return accepted < MIN_ROUNDS and (patient or 2 * accepted >= tried)

    def _time(self, calls: Slot, first: int) -> list[float]:
        times = [0.0] * len(calls)
        for index in in_turn(len(calls), first):
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


class CudaMeter:
    """Times calls on the GPU's own clock; the L2 cache is overwritten before each.

    graphs: calls are captured and replayed, so that only the GPU's work counts; without, what the
    launches cost the CPU counts too where the GPU waits for it.
    """

    def __init__(self, seconds: float, graphs: bool) -> None:
        self.seconds, self.graphs = seconds, graphs
        size = FLUSHED_CACHES * cache_bytes("cuda")
        self.flushed = torch.empty(size, dtype=torch.uint8, device="cuda")

    def prepare(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return the call as it will be timed.

        Raises:
            RuntimeError: it can't be captured as a graph.
        """
        return captured(call) if self.graphs else call

    def rounds(self, slots: Sequence[Slot]) -> tuple[list[list[float]], int]:
        """Return the ms of each call, by round, and that no round was rejected."""
        for calls in slots:
            self._time(calls, first=0)
        times: list[list[float]] = []
        start = time.perf_counter()
        while time.perf_counter() - start < self.seconds or len(times) < MIN_ROUNDS:
            calls = staggered(slots, len(times))
            times.append(self._time(calls, first=len(times) % len(calls)))
        return times, 0

    def _time(self, calls: Slot, first: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
        for index in in_turn(len(calls), first):
            start, end = events[index]
            self.flushed.zero_()
            start.record()
            calls[index]()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """Capture a call as a CUDA graph and return what replays it.

    Raises:
        RuntimeError: the call does what a graph can't hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay

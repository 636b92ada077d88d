"""What a run measures with: providers, clocks, and what this machine reaches, its ceilings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.environment import cache_bytes
from bench.footprint import Probe
from bench.providers import Provider
from bench.shapes import DTYPES, Case, floor_bytes, flops
from bench.timing import Clock, CudaMeter, Meter

GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
COPY_CACHES = 4  # the copied tensor, in sizes of the last cache


@dataclass(frozen=True)
class Ceilings:
    """Rates that were measured at the start: of a large copy, and of a large product by dtype."""

    bytes_per_second: float
    flops_per_second: dict[str, float]

    def seconds(self, case: Case) -> float:
        """Return the least time of a case at these rates; r = 0 stands for no adapter."""
        rate = self.flops_per_second[case.dtype]
        return max(flops(case) / rate, floor_bytes(case) / self.bytes_per_second)

    def __str__(self) -> str:
        rates = ", ".join(f"{d} {rate / 1e9:,.0f}" for d, rate in self.flops_per_second.items())
        return f"copy {self.bytes_per_second / 1e9:.1f} GB/s, product {rates} GFLOP/s"


@dataclass(frozen=True)
class Session:
    """What every suite is given.

    layer_clock, step_clock: a step's launches are part of it, so it is never replayed as a graph.
    cache_bytes: what rotating tensors must exceed; 0 where the clock empties the cache itself.
    """

    device: str
    providers: Sequence[Provider]
    seconds: float
    layer_clock: Clock
    step_clock: Clock
    probe: Probe
    ceilings: Ceilings
    cache_bytes: int


def start(
    device: str, providers: Sequence[Provider], seconds: float, graphs: bool, dtypes: list[str]
) -> Session:
    """Measure this machine's ceilings for some dtypes and return a session."""
    if device == "cuda":
        layers: Clock = CudaMeter(seconds, graphs)
        steps: Clock = CudaMeter(seconds, graphs=False)
    else:
        layers = steps = Meter(seconds)
    ceilings = measure_ceilings(device, dtypes, steps)
    rotated = cache_bytes(device) if device == "cpu" else 0
    return Session(device, providers, seconds, layers, steps, Probe(device), ceilings, rotated)


def measure_ceilings(device: str, dtypes: list[str], clock: Clock) -> Ceilings:
    """Time a large copy and a large product of each dtype."""
    size = max(COPY_CACHES * cache_bytes(device), 1 << 26)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _seconds(clock, lambda: target.copy_(source))
    rates = {dtype: _product_rate(clock, device, DTYPES[dtype]) for dtype in dtypes}
    return Ceilings(2 * size / copy, rates)


def _product_rate(clock: Clock, device: str, dtype: torch.dtype) -> float:
    """Return the rate of the fastest product there is: on CPUs MKL's, or oneDNN's in float32."""
    size = GEMM_SIZE[device]
    u, v = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    calls = [lambda: u @ v.T]
    if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        calls.append(lambda: onednn(u, v, None, "none", [], ""))
    return 2 * size**3 / min(_seconds(clock, call) for call in calls)


def _seconds(clock: Clock, call: Callable[[], object]) -> float:
    """Return the shortest time: a ceiling is what the machine reaches at its best."""
    times, _ = clock.rounds([[call]])
    if not times:
        raise RuntimeError("ceilings: no quiet round; try --threads 1, or later")
    return min(time for [time] in times) * 1e-3

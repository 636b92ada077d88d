"""What this machine reaches, measured at the start of a run: what times are compared with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.measure.environment import cache_bytes
from bench.measure.timing import Clock
from bench.shapes import DTYPES, Case, floor_bytes, flops

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

"""What every suite of a run is given: whom to measure, by which clocks, beside which ceilings."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.measure.ceilings import Ceilings, measure_ceilings
from bench.measure.environment import cache_bytes
from bench.measure.footprint import Probe
from bench.measure.timing import Clock, CudaMeter, Meter
from bench.providers.registry import Provider


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

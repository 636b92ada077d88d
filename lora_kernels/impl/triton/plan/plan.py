"""The plan of a call: which tiles, one launch or two, and what it should cost."""

from dataclasses import dataclass
from functools import lru_cache

from lora_kernels.impl.triton.plan.config import (
    Config,
    Layer,
    ThinConfig,
    illegal,
    padded_rank,
    shipped,
)
from lora_kernels.impl.triton.plan.cost import floor_seconds, seconds, thin_config
from lora_kernels.impl.triton.plan.device import Device


@dataclass(frozen=True)
class Plan:
    """A configuration with its time; `thin` is the first launch of a split call.

    seconds: predicted by the cost model, or measured on the GPU.
    floor: seconds of the frozen layer's own product at the GPU's peak rates.
    """

    config: Config
    thin: ThinConfig | None
    seconds: float
    floor: float
    measured: bool = False

    def __str__(self) -> str:
        c = self.config
        launches = "two launches" if self.thin else "one launch"
        copies = "descriptors" if c.descriptors else "pointers"
        return (
            f"tiles {c.rows}x{c.columns}x{c.depth}, {c.warps} warps, {c.stages} stages, {copies}, "
            f"{launches}; {'measured' if self.measured else 'predicted'} "
            f"{self.seconds * 1e6:.1f} us, floor {self.floor * 1e6:.1f} us"
        )


def rounded(layer: Layer) -> Layer:
    """Return the layer with M as the next power of two: batch shapes of a run share plans."""
    return layer._replace(m=1 << (layer.m - 1).bit_length())


@lru_cache(maxsize=4096)
def plan(layer: Layer, device: Device) -> Plan:
    """Return the legal configuration that the cost model predicts to be fastest; pure.

    Raises:
        ValueError: no configuration is legal, which happens for ranks above 256 only.
    """
    layer = rounded(layer)
    candidates = [c for c in shipped(layer) if illegal(c, layer, device) is None]
    if not candidates:
        raise ValueError(f"layer: expected one that some configuration serves, got {layer}")
    best = min(candidates, key=lambda c: (seconds(c, layer, device), c))
    thin = thin_of(best, layer, device)
    return Plan(best, thin, seconds(best, layer, device), floor_seconds(layer, device))


def thin_of(config: Config, layer: Layer, device: Device) -> ThinConfig | None:
    """Return the tiles of the split path's first launch, or None where there is none."""
    wanted = not layer.backward or layer.needs[0] or layer.needs[1]
    return thin_config(layer, device) if config.producers == 0 and wanted else None


def segment_rows(m: int, n: int, r: int, config: Config) -> int:
    """Return the rows that one tile of dA or dB sums, a multiple of the tile's rows.

    Few enough that a sum, which waits for memory, lasts no longer than a tile of dx, which streams
    four times its bytes from cache meanwhile; so many that the partial sums written and read
    again stay below 3 % of the call's bytes.
    """
    balanced = (config.rows + config.columns) * n // (4 * config.sum_columns)
    rows = max(balanced, 128 * padded_rank(r))
    step = max(config.rows, config.sum_rows)
    return -(-min(rows, m) // step) * step

"""The plan of a call: which tiles, one launch or two, and what it should cost."""

from dataclasses import dataclass
from functools import lru_cache

from lora_kernels.impl.triton.plan.config import (
    Config,
    Problem,
    ShrinkConfig,
    illegal,
    padded_rank,
    shipped,
    shrink_config,
)
from lora_kernels.impl.triton.plan.cost import floor_seconds, seconds
from lora_kernels.impl.triton.plan.device import Device


@dataclass(frozen=True)
class Plan:
    """A configuration with its time; `shrink` is the first launch of a split call.

    segment: rows that one tile of dA or dB sums, a multiple of the tiles' rows.
    seconds: predicted by the cost model, or measured on the GPU.
    floor: seconds of the frozen layer's own product at the GPU's peak rates.
    """

    config: Config
    shrink: ShrinkConfig | None
    segment: int
    seconds: float
    floor: float
    measured: bool = False

    def segment_of(self, m: int) -> int:
        """Return the rows of a segment where there are M: no more than whole tiles take."""
        step = max(self.config.block_m, self.config.sum_rows)
        return min(self.segment, -(-m // step) * step)

    def __str__(self) -> str:
        c = self.config
        launches = "two launches" if self.shrink else "one launch"
        copies = "descriptors" if c.descriptors else "pointers"
        return (
            f"tiles {c.block_m}x{c.block_n}x{c.block_k}, {c.num_warps} warps, "
            f"{c.num_stages} stages, {copies}, {launches}; "
            f"{'measured' if self.measured else 'predicted'} "
            f"{self.seconds * 1e6:.1f} us, floor {self.floor * 1e6:.1f} us"
        )


def rounded(problem: Problem) -> Problem:
    """Return the layer with M as the next power of two: batch shapes of a run share plans."""
    return problem._replace(m=1 << (problem.m - 1).bit_length())


@lru_cache(maxsize=4096)
def plan(problem: Problem, device: Device) -> Plan:
    """Return the legal configuration that the cost model predicts to be fastest; pure.

    Raises:
        ValueError: no configuration is legal, which happens for ranks above 256 only.
    """
    problem = rounded(problem)
    candidates = [c for c in shipped(problem) if illegal(c, problem, device) is None]
    if not candidates:
        raise ValueError(f"problem: expected one that some configuration serves, got {problem}")
    return plan_of(min(candidates, key=lambda c: (seconds(c, problem, device), c)), problem, device)


def plan_of(config: Config, problem: Problem, device: Device) -> Plan:
    """Return the plan that takes a given configuration, legal or not."""
    wanted = not problem.backward or problem.needs[0] or problem.needs[1]
    shrink = shrink_config(problem, device) if config.xa_columns == 0 and wanted else None
    return Plan(
        config,
        shrink,
        segment_rows(problem.n, problem.r, config),
        seconds(config, problem, device),
        floor_seconds(problem, device),
    )


def segment_rows(n: int, r: int, config: Config) -> int:
    """Return the rows that one tile of dA or dB sums, a multiple of the tiles' rows.

    Few enough that a sum, which waits for memory, lasts no longer than a tile of dx, which streams
    four times its bytes from cache meanwhile; so many that the partial sums written and read
    again stay below 3 % of the call's bytes.
    """
    balanced = (config.block_m + config.block_n) * n // (4 * config.sum_columns)
    rows = max(balanced, 128 * padded_rank(r))
    step = max(config.block_m, config.sum_rows)
    return -(-rows // step) * step

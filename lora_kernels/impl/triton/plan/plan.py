"""The plan of a call: whose GEMM, which tiles, how many launches, and what it should cost."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from lora_kernels.impl.gpu import MAX_RANK
from lora_kernels.impl.triton.plan.config import (
    AnyConfig,
    Config,
    LibraryConfig,
    Problem,
    ShrinkConfig,
    illegal,
    library_alone,
    library_config,
    padded_rank,
    shipped,
    shrink_config,
)
from lora_kernels.impl.triton.plan.cost import (
    frozen_seconds,
    library_seconds,
    peft_seconds,
    seconds,
)
from lora_kernels.impl.triton.plan.device import Device

# One launch is taken where it is predicted this much faster: predictions of it err by 10 %, and the
# library plan's GEMM is PEFT's own, with fewer passes beside it.
MARGIN = 0.95


class Seconds(NamedTuple):
    """What a call takes without an adapter, and by each way to compute it."""

    frozen: float
    peft: float
    library: float
    one_launch: float | None  # None where `library_alone` has a reason, or nothing is legal

    def __str__(self) -> str:
        one = "-" if self.one_launch is None else _us(self.one_launch)
        return (
            f"frozen {_us(self.frozen)}, PEFT {_us(self.peft)}, library {_us(self.library)}, "
            f"one launch {one}"
        )


@dataclass(frozen=True)
class Plan:
    """How a call is computed, with its time: the library plan, or one of Triton's own products.

    config: of the library plan's passes, or of one launch; two where there is a `shrink` beside.
    shrink: tiles of the launch that makes xa, or of the library plan's dxa.
    segment: rows that one tile of dA or dB sums, a multiple of the tiles' rows.
    seconds: predicted by the cost model, or measured on the GPU.
    predicted: by the cost model, of every way to compute the call.
    form: the format of W; what isn't dense is decoded by a launch before, unless config.codes.
    """

    config: AnyConfig
    shrink: ShrinkConfig | None
    segment: int
    seconds: float
    predicted: Seconds
    measured: bool = False
    form: str = "dense"

    def segment_of(self, m: int) -> int:
        """Return the rows of a segment where there are M: no more than whole tiles take."""
        panels = self.config if isinstance(self.config, Config) else self.shrink
        assert panels is not None
        step = max(panels.block_m, self.config.sum_rows)
        return min(self.segment, -(-m // step) * step)

    def __str__(self) -> str:
        how = "measured" if self.measured else "predicted"
        of = ""
        if self.form != "dense":
            in_loop = isinstance(self.config, Config) and self.config.codes
            of = f"W decoded from {self.form} {'in the loop' if in_loop else 'first'}, "
        return f"{of}{self._launches()}; {how} {_us(self.seconds)} us; predicted: {self.predicted}"

    def _launches(self) -> str:
        c = self.config
        if isinstance(c, LibraryConfig):
            return "library plan"
        copies = "descriptors" if c.descriptors else "pointers"
        return (
            f"{'two launches' if self.shrink else 'one launch'}, tiles "
            f"{c.block_m}x{c.block_n}x{c.block_k}, {c.num_warps} warps, {c.num_stages} stages, "
            f"{copies}"
        )


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def rounded(problem: Problem) -> Problem:
    """Return the layer with M as the next power of two: batch shapes of a run share plans."""
    return problem._replace(m=1 << (problem.m - 1).bit_length())


@lru_cache(maxsize=4096)
def plan(problem: Problem, device: Device) -> Plan:
    """Return the plan that the cost model predicts to be fastest; pure.

    Raises:
        ValueError: no plan serves the call, which happens for ranks above 256 only.
    """
    problem = rounded(problem)
    if not 1 <= problem.r <= MAX_RANK:
        raise ValueError(f"problem: expected a rank of 1 to {MAX_RANK}, got {problem}")
    library = library_plan(problem, device)
    config = fastest_config(problem, device)
    if config is None:
        return library
    one = plan_of(config, problem, device)
    return one if one.seconds < MARGIN * library.seconds else library


@lru_cache(maxsize=4096)
def fastest_config(problem: Problem, device: Device) -> Config | None:
    """Return the one launch that is predicted to be fastest, or None if there should be none."""
    legal = one_launch_configs(problem, device)
    return min(legal, key=lambda config: (seconds(config, problem, device), config), default=None)


def one_launch_configs(problem: Problem, device: Device) -> list[Config]:
    """Return the configurations of one launch that may serve a layer on a device."""
    return [config for config in shipped(problem) if may_serve(config, problem, device)]


def may_serve(config: Config, problem: Problem, device: Device) -> bool:
    """Whether a configuration of one launch may serve a layer on a device."""
    return not library_alone(problem, device) and not illegal(config, problem, device)


def plan_of(config: AnyConfig, problem: Problem, device: Device) -> Plan:
    """Return the plan that takes a given configuration, legal or not."""
    if isinstance(config, LibraryConfig):
        return library_plan(problem, device)
    wanted = not problem.backward or problem.needs[0] or problem.needs[1]
    shrink = shrink_config(problem, device) if config.xa_columns == 0 and wanted else None
    segment = segment_rows(problem.n, problem.r, config)
    time = seconds(config, problem, device)
    return Plan(config, shrink, segment, time, _predicted(problem, device), form=problem.form)


def library_plan(problem: Problem, device: Device) -> Plan:
    """Return the library plan of a call: any layout, any size."""
    problem = rounded(problem)
    config, shrink = library_config(problem), shrink_config(problem, device)
    segment = _library_segment(problem, config, shrink, device)
    predicted = _predicted(problem, device)
    return Plan(config, shrink, segment, predicted.library, predicted, form=problem.form)


def dora_plan(chosen: Plan, problem: Problem, device: Device) -> Plan:
    """Return the plan of a DoRA layer, given that of the linear layer of its sizes."""
    own = isinstance(chosen.config, Config)
    return library_plan(problem, device) if own and problem.dropout else chosen


def _predicted(problem: Problem, device: Device) -> Seconds:
    config = fastest_config(problem, device)
    return Seconds(
        frozen_seconds(problem, device),
        peft_seconds(problem, device),
        library_seconds(problem, device),
        None if config is None else seconds(config, problem, device),
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


def _library_segment(
    problem: Problem, config: LibraryConfig, shrink: ShrinkConfig, device: Device
) -> int:
    """Return the rows that one program of a pass sums.

    So few that all multiprocessors have two programs, within limits: partial sums, float32, take
    4 · ranks / rows of the bytes of dy or x.
    """
    blocks = min(-(-problem.n // config.sum_columns), -(-problem.k // config.pass_columns))
    filling = problem.m * blocks // (2 * device.multiprocessors)
    rows = max(8 * problem.block_r, min(64 * problem.block_r, filling))
    step = max(shrink.block_m, config.sum_rows)
    return -(-rows // step) * step

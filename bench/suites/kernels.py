"""The kernels suite: what ships for GPUs, compiled, counted and predicted without one.

Nothing here is a time. Counts come from the PTX virtual machine where it is, which models no cache,
latency or occupancy; registers, spills and shared memory from ptxas; predictions from the cost
model, whose rates are the vendor's.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.suites import framework_launches
from bench.suites.framework_launches import TILE, Step
from lora_kernels.impl.triton.plan import cost
from lora_kernels.impl.triton.plan.config import Config, Problem, illegal
from lora_kernels.impl.triton.plan.plan import plan
from lora_kernels.impl.triton.tools.compiler import compile_for, resources
from lora_kernels.impl.triton.tools.inspect import code_of
from lora_kernels.impl.triton.tools.machine import GPUS, Machine
from lora_kernels.impl.triton.tools.record import Launch, launches

M, N, K, R = 512, 1024, 1024, 16
QUICK_M, QUICK_SIZE = 256, 512
LARGE = (8192, 4096, 4096, 16)  # what is predicted beside the counted size
PLAIN, OURS = "plain product", "ours"
RIVALS: dict[str, Callable[[Problem], list[Step]]] = {
    PLAIN: framework_launches.plain,
    "PEFT's launches": framework_launches.peft,
    "addmm's launches": framework_launches.addmm,
}
PROGRAMS = 16
NO_MACHINE = "the PTX virtual machine (module ptxvm on PYTHONPATH) is not there"


@dataclass(frozen=True)
class Counts:
    """What a call executed, all of its launches together; instructions are a warp's."""

    instructions: int
    mma_instructions: int
    flops: int
    unique_bytes: int
    requested_bytes: int
    conflicts: int


@dataclass(frozen=True)
class Compiled:
    """What ptxas reports of a call's launches: of the largest kernel, and the worst spill."""

    registers: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class KernelRow:
    """A call's compiled kernels, what they executed, and what the cost model says.

    counts: None without the virtual machine. predicted_us: of the counted size; large_us: of LARGE.
    producing_ratio: instructions of the longest tile that makes xa or dxa over those of one that
        doesn't.
    """

    arch: int
    direction: str
    dropout: bool
    size: tuple[int, int, int, int]
    what: str
    config: str
    launches: int
    compiled: Compiled
    counts: Counts | None
    predicted_us: float
    large_us: float
    producing_ratio: float | None = None

    LINE = "  {:<36}{:>9}{:>9}{:>7}{:>7}{:>11}{:>10}{:>11}{:>6}{:>9}{:>9}{:>7}"
    HEADER = LINE.format(
        "counted, not measured", "launches", "k instr", "MMA", "GFLOP", "unique MB", "moved MB",
        "conflicts", "regs", "spilt B", "pred us", "large",
    )  # fmt: skip

    def __str__(self) -> str:
        counted = ["-"] * 6
        if (c := self.counts) is not None:
            counted = [
                f"{c.instructions / 1e3:,.0f}",
                f"{c.mma_instructions / c.instructions:.1%}",
                f"{c.flops / 1e9:.2f}",
                f"{c.unique_bytes / 1e6:.2f}",
                f"{c.requested_bytes / 1e6:.2f}",
                f"{c.conflicts}",
            ]
        return self.LINE.format(
            f"{self.what} {self.config}".strip(),
            self.launches,
            *counted,
            self.compiled.registers,
            self.compiled.spill_bytes,
            f"{self.predicted_us:.1f}",
            f"{self.large_us:.0f}",
        )


def layers(quick: bool) -> list[Problem]:
    """Return what is counted: both directions, with and without dropout."""
    m, n, k, r = (QUICK_M, QUICK_SIZE, QUICK_SIZE, R) if quick else (M, N, K, R)
    return [
        Problem(m, n, k, r, 16, dropout, True, backward)
        for backward in (False, True)
        for dropout in (False, True)
    ]


def title(layer: Problem, arch: int) -> str:
    """Return what a point of the suite is about."""
    counted = "counted" if has_machine() else f"compiled only: {NO_MACHINE}"
    direction, dropout = _direction(layer), "0.1" if layer.dropout else "0"
    return f"sm_{arch} {direction} {_size(layer)} bf16 p={dropout}, {counted}"


def measure(layer: Problem, arch: int, quick: bool) -> Iterator[KernelRow]:
    """Count a call of ours in one tile size, the plain product, and eager frameworks' launches."""
    torch.manual_seed(0)
    for what, steps_of in RIVALS.items():
        calls = list(framework_launches.recorded(steps_of(layer)))
        seconds = [
            framework_launches.predicted_seconds(steps_of(s), GPUS[arch]) for s in _sizes(layer)
        ]
        yield _row(layer, arch, what, "", calls, seconds)
    for config in configs(layer, arch, quick):
        seconds = [_our_seconds(config, sized, arch) for sized in _sizes(layer)]
        row = _row(layer, arch, OURS, _label(config), of_call(layer, config, arch), seconds)
        counted = has_machine() and not quick
        if counted:
            row = replace(row, producing_ratio=producing_ratio(arch, layer, config))
        yield row


def configs(layer: Problem, arch: int, quick: bool) -> Iterator[Config]:
    """Yield the tile of the plain product as ours may take it: copies, xa columns."""
    device = GPUS[arch]
    # The best first, which a quick run takes alone.
    columns = (1,) if layer.backward else (4, 1) if layer.dropout else (1, 2)
    for xa_columns in columns:
        for descriptors in (False, True) if device.descriptors else (False,):
            config = replace(TILE, xa_columns=xa_columns, descriptors=descriptors)
            best = xa_columns == columns[0] and descriptors == device.descriptors
            if best or not quick:
                yield config


def _row(
    layer: Problem,
    arch: int,
    what: str,
    config: str,
    calls: Sequence[Launch],
    seconds: Sequence[float],
) -> KernelRow:
    counts = executed(arch, calls) if has_machine() else None
    small_us, large_us = (1e6 * second for second in seconds)
    place = (arch, _direction(layer), layer.dropout, layer[:4], what, config)
    return KernelRow(*place, len(calls), compiled(arch, calls), counts, small_us, large_us)


def _sizes(layer: Problem) -> list[Problem]:
    m, n, k, r = LARGE
    return [layer, layer._replace(m=m, n=n, k=k, r=r)]


def _our_seconds(config: Config, layer: Problem, arch: int) -> float:
    """Return the prediction for the counted tile, or where it isn't legal for the picker's."""
    device = GPUS[arch]
    if illegal(config, layer, device) is not None:
        return plan(layer, device).seconds
    return cost.seconds(config, layer, device)


def _label(config: Config) -> str:
    copies = "descriptors" if config.descriptors else "pointers"
    return f"by {copies}, {config.xa_columns} xa columns"


def _direction(layer: Problem) -> str:
    return "backward" if layer.backward else "forward"


def _size(layer: Problem) -> str:
    return "x".join(map(str, layer[:3])) + f" r={layer.r}"


def has_machine() -> bool:
    """Whether the virtual machine can be imported."""
    return find_spec("ptxvm") is not None


def executed(arch: int, calls: Sequence[Launch], programs: int = PROGRAMS) -> Counts:
    """Run launches in the virtual machine and add up their counts; any report is an error."""
    of_launches = map(_of_launch, _statistics(arch, calls, programs))
    return Counts(*map(sum, zip(*of_launches, strict=True)))


def _statistics(arch: int, calls: Sequence[Launch], programs: int) -> list[dict[str, Any]]:
    machine = Machine(arch, programs)
    for call in calls:
        machine.run(*call)
    return [stats.data for stats in machine.stats]


def _of_launch(data: dict[str, Any]) -> tuple[int, ...]:
    return (
        data["warp_instructions"],
        data["mma_instructions"],
        data["mma_flops"],
        sum(buffer["read"] + buffer["written"] for buffer in data["buffers"].values()),
        data["global_load_bytes"] + data["global_store_bytes"],
        data["shared_bank_conflicts"],
    )


def compiled(arch: int, calls: Sequence[Launch]) -> Compiled:
    """Compile launches and report what they take of a multiprocessor."""
    with tempfile.TemporaryDirectory() as scratch:
        reports = [resources(compile_for(arch, *code_of(c)), Path(scratch)) for c in calls]
    return Compiled(
        max(report.registers for report in reports),
        max(report.spill_bytes for report in reports),
        max(report.shared_bytes for report in reports),
    )


def of_call(layer: Problem, config: Config, arch: int, programs: int = PROGRAMS) -> list[Launch]:
    """Return the launches of a call of ours on a GPU of so many multiprocessors."""
    return launches(layer, config, replace(GPUS[arch], multiprocessors=programs))


def _without_waiting(data: dict[str, Any]) -> int:
    """Return a launch's instructions but what waits: questions to barriers and flags.

    A question to a barrier is two instructions, with the branch on its answer; what else is asked
    of barriers is to expect the bytes of two copies. One more to a flag is four, a sleep first.
    """
    opcodes = data["opcodes"]
    of_barriers = opcodes.get("mbarrier", 0) - opcodes.get("cp.async.bulk", 0) // 2
    return data["warp_instructions"] - 2 * of_barriers - 4 * opcodes.get("nanosleep", 0)


def producing_ratio(arch: int, layer: Problem, config: Config) -> float:
    """Return `producing_ratio` of a `KernelRow`: of the longest of a row panel's shrinking tiles.

    One program runs, with the flag that its tiles wait for far above what they ask. A tile's count
    is what it adds to those after it; waiting for copies isn't counted.
    """
    part = layer._replace(m=config.block_m, needs=(True, False, False, False))
    tiles = -(-layer.out // config.block_n)
    (call,) = of_call(part, config, arch, tiles)

    def count_from(tile: int) -> int:
        machine = Machine(arch, resident=max(config.xa_columns, 1))
        call.flags[:2] = torch.tensor([1 << 20, tile], dtype=torch.int32)
        machine.run(*call._replace(grid=1))
        return _without_waiting(machine.stats[0].data)

    try:
        totals = [count_from(tile) for tile in range(config.xa_columns + 2)]
    finally:
        call.flags.zero_()
    *shrinks, plain = (total - later for total, later in pairwise(totals))
    return max(shrinks) / plain

"""Where Triton kernels run in tests: the interpreter, a PTX virtual machine, or a GPU."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch

from lora_kernels.impl.executor import using
from lora_kernels.impl.triton.launch import Forgetful, Gpu, add_product
from lora_kernels.impl.triton.plan.config import Config, Problem, illegal, shipped
from lora_kernels.impl.triton.plan.cost import seconds
from lora_kernels.impl.triton.plan.device import Device, known
from lora_kernels.impl.triton.plan.plan import Plan, library_plan, plan_of, rounded
from lora_kernels.impl.triton.plan.tuned import planned
from lora_kernels.impl.triton.workspace import Workspace
from lora_kernels.testing import Case, assert_results, make_inputs, run
from tests.support.implementations import Place, needs_gpu

pytest.importorskip("triton")

from lora_kernels.impl.triton.tools.machine import Machine

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_MACHINE = importlib.util.find_spec("ptxvm") is not None

needs_compiler = pytest.mark.skipif(INTERPRETED, reason="needs TRITON_INTERPRET unset")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
needs_machine = pytest.mark.skipif(
    not HAS_MACHINE or INTERPRETED,
    reason="needs the PTX virtual machine (module ptxvm on PYTHONPATH), TRITON_INTERPRET unset",
)


@dataclass
class Interpreter(Forgetful):
    """Triton's interpreter: programs run one after the other, so there may be only one."""

    impl = "triton"
    plan: Callable[[Problem, Device], Plan] = planned
    workspace: Workspace = field(default_factory=Workspace)

    def device(self, tensor: torch.Tensor) -> Device:
        return replace(known("NVIDIA A100-SXM4-80GB"), multiprocessors=1)

    def programs(self, device: Device) -> int:
        return 1

    def run(self, kernel: Any, grid: int, args: Any, constants: Any, how: Any) -> None:
        kernel[(grid,)](**args, **constants, num_warps=how.num_warps, num_stages=how.num_stages)

    add_product = staticmethod(add_product)


class PlannedGpu(Gpu):
    """The GPU's own launcher, with plans of a test."""

    def __init__(self, plan: Callable[[Problem, Device], Plan]) -> None:
        super().__init__()
        self._plan = plan

    def plan(self, problem: Problem, device: Device) -> Plan:
        return self._plan(problem, device)


def _gpu(plan: Callable[[Problem, Device], Plan] | None = None) -> PlannedGpu | None:
    return None if plan is None else PlannedGpu(plan)


def executors() -> list[Any]:
    """Return every executor of this process as a pytest parameter, with visible skips.

    A place makes one, by keyword with another `plan`; None stands for the GPU's own.
    """
    return [
        pytest.param(Place("cpu", Interpreter), id="interpreter", marks=needs_interpreter),
        pytest.param(Place("cpu", partial(Machine, 80)), id="sm_80", marks=needs_machine),
        pytest.param(Place("cpu", partial(Machine, 90)), id="sm_90", marks=needs_machine),
        pytest.param(Place("cpu", partial(Machine, 100)), id="sm_100", marks=needs_machine),
        pytest.param(Place("cuda", _gpu), id="gpu", marks=[needs_gpu, needs_compiler]),
    ]


def fixed_plan(segment: int | None = None, **fields: Any) -> Callable[[Problem, Device], Plan]:
    """Return a planner of one configuration: small tiles, one launch, unless `fields` differ.

    segment: rows of dA's and dB's segments, if not the planner's.
    """
    small = {"block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 3}
    wanted = Config(**(small | fields))

    def plan(problem: Problem, device: Device) -> Plan:
        most = 1 if problem.backward else wanted.xa_columns
        config = replace(wanted, xa_columns=min(wanted.xa_columns, most))
        fixed = plan_of(config, problem, device)
        return fixed if segment is None else replace(fixed, segment=segment)

    return plan


def fixed_library(segment: int = 64) -> Callable[[Problem, Device], Plan]:
    """Return a planner of the library plan, by segments of so many rows."""

    def plan(problem: Problem, device: Device) -> Plan:
        return replace(library_plan(problem, device), segment=segment)

    return plan


def own_plan(problem: Problem, device: Device) -> Plan:
    """Plan a call by Triton's own products, the fastest by the cost model, and in any layout.

    DoRA has few of them, for 16 bits: the library's plan where there is none.
    """
    problem = rounded(problem)
    legal = [c for c in shipped(problem) if illegal(c, problem, device) is None]
    if problem.gain and not legal:
        return library_plan(problem, device)
    return plan_of(min(legal, key=lambda c: (seconds(c, problem, device), c)), problem, device)


# What a test of either plan takes by turns.
PLANS: tuple[Callable[[Problem, Device], Plan], ...] = (own_plan, fixed_library())


def check_same_bits(case: Case, make: Callable[..., Any], library: bool = False) -> None:
    """Check a call's results, the same to the bit whatever the schedule.

    Sums over rows are of five segments or so: two would be the same in either order. Of many
    programs at once the last to arrive varies. xa is summed over three parts of K, and left by
    each to the next.
    make: returns a machine with programs at once, a seed and a plan.
    library: whether by the library plan.
    """
    inputs = make_inputs(case)
    runs = []
    for resident, seed in ((5, 1), (3, 2), (15, 3), (20, 4)):
        machine = make(resident, seed)
        descriptors = machine.target > 80
        machine.plan = fixed_plan(segment=64, descriptors=descriptors, xa_columns=3)
        if library:
            machine.plan = fixed_library()
        with running(machine):
            runs.append(run(case, inputs, "triton"))
    assert_results(case, inputs, runs[0], "triton")
    for other in runs[1:]:
        for name, expected in runs[0].items():
            assert torch.equal(other[name], expected), f"other bits of {name}"


@contextmanager
def running(executor: Any) -> Iterator[Any]:
    """Let calls use the executor; None stands for the GPU's own."""
    # A GPU's backward has a thread of its own, which doesn't know this one's executor.
    threads = torch.autograd.set_multithreading_enabled(not isinstance(executor, PlannedGpu))
    with using(executor), threads:
        yield executor

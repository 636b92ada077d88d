"""Executors of Triton's kernels with a plan that is named, whichever the planner would take."""

from collections.abc import Callable
from functools import cache, lru_cache

from lora_kernels.impl.triton.launch import Gpu
from lora_kernels.impl.triton.plan.config import Problem
from lora_kernels.impl.triton.plan.device import Device
from lora_kernels.impl.triton.plan.plan import Plan, fastest_config, library_plan, plan_of

Planner = Callable[[Problem, Device], Plan]


class Planned(Gpu):
    """The GPU's executor with a plan of ours."""

    def __init__(self, planner: Planner) -> None:
        super().__init__()
        self._planner = planner

    def plan(self, problem: Problem, device: Device) -> Plan:
        """Return the plan of a call."""
        return self._planner(problem, device)


@cache
def planned(planner: Planner) -> Planned:
    """Return the executor of a planner: calls share what it keeps."""
    return Planned(planner)


@lru_cache
def one_launch(problem: Problem, device: Device) -> Plan:
    """Return the likeliest plan of Triton's own products; the library plan where none may serve."""
    config = fastest_config(problem, device)
    return library_plan(problem, device) if config is None else plan_of(config, problem, device)

"""Where Triton kernels run in tests: the interpreter, a PTX virtual machine, or a GPU."""

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from lora_kernels.impl.executor import using
from lora_kernels.impl.triton.plan.device import Device, known
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
class Interpreter:
    """Triton's interpreter: programs run one after the other, so there may be only one."""

    impl = "triton"

    def device(self, tensor: torch.Tensor) -> Device:
        return replace(known("NVIDIA A100-SXM4-80GB"), multiprocessors=1)

    def programs(self, device: Device) -> int:
        return 1

    def run(self, kernel: Any, grid: int, args: Any, constants: Any, how: Any) -> None:
        kernel[(grid,)](**args, **constants, num_warps=how.num_warps, num_stages=how.num_stages)


def executors() -> list[Any]:
    """Return every executor of this process as a pytest parameter, with visible skips."""
    return [
        pytest.param(Place("cpu", Interpreter), id="interpreter", marks=needs_interpreter),
        pytest.param(Place("cpu", lambda: Machine(80)), id="sm_80", marks=needs_machine),
        pytest.param(Place("cpu", lambda: Machine(90)), id="sm_90", marks=needs_machine),
        pytest.param(Place("cpu", lambda: Machine(100)), id="sm_100", marks=needs_machine),
        pytest.param(Place("cuda", lambda: None), id="gpu", marks=[needs_gpu, needs_compiler]),
    ]


def fix_plan(monkeypatch: Any, **fields: Any) -> None:
    """Let every call take one configuration: small tiles, one launch, unless `fields` differ."""
    from lora_kernels.impl.triton import linear
    from lora_kernels.impl.triton.plan.config import Config, shrink_config
    from lora_kernels.impl.triton.plan.plan import Plan

    small = {"block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 3}
    wanted = Config(**(small | fields))

    def fixed(problem: Any, device: Device) -> Plan:
        most = 1 if problem.backward else wanted.xa_columns
        config = replace(wanted, xa_columns=min(wanted.xa_columns, most))
        shrink = None if config.xa_columns else shrink_config(problem, device)
        return Plan(config, shrink, 0.0, 0.0)

    monkeypatch.setattr(linear, "planned", fixed)


def check_same_bits(case: Case, target: int, monkeypatch: Any) -> None:
    """Check a call's results, the same to the bit whatever the schedule.

    Sums over rows are of five segments or so: two would be the same in either order. xa is summed
    over three parts of K, and left by each to the next.
    """
    from lora_kernels.impl.triton import linear

    fix_plan(monkeypatch, descriptors=target > 80, xa_columns=3)
    monkeypatch.setattr(linear, "segment_rows", lambda *_: 64)
    inputs = make_inputs(case)
    runs = []
    for resident, seed in ((5, 1), (3, 2), (9, 3), (12, 4)):
        with running(Machine(target, resident, seed)):
            runs.append(run(case, inputs, "triton"))
    assert_results(case, inputs, runs[0], "triton")
    for other in runs[1:]:
        for name, expected in runs[0].items():
            assert torch.equal(other[name], expected), f"other bits of {name}"


def running(executor: Any) -> Any:
    """Return a context in which calls use the executor; None stands for the GPU's own."""
    return using(executor)

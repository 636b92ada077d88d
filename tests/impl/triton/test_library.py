"""The library plan: its passes, what they touch, and what they are called with.

Cases of the parity suite take it by turns with Triton's own products (tests/support/targets.py).
"""

from functools import partial
from itertools import product

import pytest
import torch

from lora_kernels.impl.triton.plan.config import Problem, library_config
from lora_kernels.impl.triton.plan.device import known
from lora_kernels.impl.triton.plan.plan import library_plan
from lora_kernels.testing import Case, assert_parity, float16_range_cases, make_inputs
from tests.support.executors import (
    Machine,
    check_same_bits,
    executors,
    fixed_library,
    needs_compiler,
    needs_machine,
    running,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H100 = known("NVIDIA H100 80GB HBM3")


@pytest.mark.many
@pytest.mark.parametrize("index", range(len(float16_range_cases((), 1, 1, 1))))
@pytest.mark.parametrize("executor", executors())
def test_float16_range(executor, index):
    """Three segments of dxa, each with units of its own."""
    case = float16_range_cases((150,), 72, 136, 5)[index]
    with running(executor(plan=fixed_library())):
        assert_parity(case, make_inputs(case, executor.memory), "triton")


@pytest.mark.many
@needs_machine
@pytest.mark.parametrize("r", [96, 256])
@pytest.mark.parametrize("target", [80, 90, 100])
def test_large_ranks(target, r):
    """Slabs of ranks in dB, all ranks at once in dA; adapters are wider than x."""
    case = Case((150,), 136, 200, r, BF16, FP32, dropout_p=0.1)
    with running(Machine(target, resident=3, seed=r, plan=fixed_library(128))):
        assert_parity(case, make_inputs(case), "triton")


@needs_machine
@pytest.mark.many
@pytest.mark.parametrize("target", [80, 90, 100])
def test_same_bits_whatever_the_schedule(target):
    case = Case((300,), 200, 384, 24, BF16, FP32, 0.1)
    check_same_bits(case, partial(Machine, target), library=True)


@needs_machine
def test_workspace_is_left_as_found():
    case = Case((300,), 136, 200, 16, BF16, dropout_p=0.1)
    with running(Machine(80, resident=5, plan=fixed_library())) as machine:
        for _ in range(3):
            assert_parity(case, make_inputs(case), "triton")
    assert not machine.workspace.zeros(1, torch.device("cpu")).any()


FORWARD = ["shrink_kernel", "expand_kernel", "product"]
BACKWARD = ["dy_pass_kernel", "x_pass_kernel", "product"]
NEEDS = {
    (True, True, True, True): BACKWARD,
    (True, False, False, False): BACKWARD,
    (False, True, True, False): BACKWARD[:2],
    (False, False, True, False): BACKWARD[:1],
    (False, False, False, True): BACKWARD[:1],
}


@needs_compiler
@pytest.mark.parametrize("dropout", [False, True], ids=["p0", "p"])
def test_a_call_is_three_launches_at_most(dropout):
    """Three at most, and none waits for other programs."""
    from lora_kernels.impl.triton.tools.record import Launch, calls

    problem = Problem(512, 256, 384, 16, 16, dropout)
    config = library_config(problem)
    for needs, expected in (None, FORWARD), *NEEDS.items():
        asked = problem if needs is None else problem._replace(backward=True, needs=needs)
        made = calls(asked, config, H100, memory="meta")
        names = [c.kernel.__name__ if isinstance(c, Launch) else "product" for c in made]
        assert names == expected
        assert all(call.how.together == 1 for call in made if isinstance(call, Launch))


@pytest.mark.slow
@needs_machine
@pytest.mark.parametrize("dropout", [False, True], ids=["p0", "p"])
def test_bytes_of_the_passes(dropout):
    """Each reads or writes x, y, dy and dx once; what is small beside them is a tenth."""
    from lora_kernels.impl.triton.tools.record import launches

    m, n, k, r = 256, 512, 512, 16
    for backward, sides in (False, m * k + m * n), (True, m * n + 2 * m * k):
        problem = Problem(m, n, k, r, 16, dropout, backward=backward)
        machine = Machine(80, resident=2)
        device = machine.device(torch.empty(0))
        for launch in launches(problem, library_config(problem), device):
            machine.run(*launch)
        buffers = [each for stats in machine.stats for each in stats.data["buffers"].values()]
        touched = sum(each["read"] + each["written"] for each in buffers)
        small = 4 * r * (n + k) * 2 + 8 * m * r  # factors, their gradients, xa and dxa
        assert 2 * sides <= touched <= 2 * sides + small


def test_segments_fill_the_gpu_within_limits():
    """Two programs a multiprocessor where partial sums allow it: they take 4 R / rows of a pass."""
    for m, r in product((512, 8192, 131072), (16, 64, 256)):
        problem = Problem(m, 4096, 4096, r, 16, True, backward=True)
        chosen = library_plan(problem, H100)
        segment = chosen.segment_of(m)
        assert segment % max(chosen.shrink.block_m, chosen.config.sum_rows) == 0
        assert segment >= min(m, 8 * r)
        assert segment <= max(64 * r, 128)

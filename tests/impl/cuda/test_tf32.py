"""TF32 in the compiled CUDA kernels, and torch's switch, which decides; in a machine or on a GPU.

The budget is of eager PyTorch by TF32; see `testing.eager_results`.
"""

from itertools import product

import pytest
import torch

import lora_kernels as lk
from lora_kernels.impl.cuda.tools.machine import Machine
from lora_kernels.impl.executor import using
from lora_kernels.testing import (
    Case,
    assert_parity,
    assert_results,
    assert_within_budget,
    make_inputs,
    reference_results,
    run,
)
from tests.support.cuda_executors import A100, EXECUTORS, RTX3090, needs_machine, needs_part
from tests.support.layouts import LAYOUTS, laid_out

pytestmark = [pytest.mark.many, needs_part]
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def switch(float32_precision):
    """Allow TF32 as a user does."""
    float32_precision("high")
    return float32_precision


def _cases():
    """Every M with every R and dropout; N, K and the adapters' dtype go round."""
    for index, (m, r, p) in enumerate(
        product((1, 7, 129, 300), (1, 5, 16, 24, 64, 96), (0.0, 0.1))
    ):
        k, n = (136, 200, 384)[index % 3], (384, 136, 200)[index // 3 % 3]
        yield Case((m,), n, k, r, FP32, BF16 if index % 5 == 0 else None, p, bias=index % 2 == 0)


CASES = list(_cases())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_sizes_and_ranks(executor, case):
    index = CASES.index(case)
    shared = (A100, RTX3090)[index // 2 % 2]
    with executor(resident=1 + index % 7, seed=index, shared_bytes=shared):
        assert_parity(case, make_inputs(case, executor.memory), "cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_strided_tensors(executor, layout):
    case = Case((4, 33), 72, 136, 5, dropout_p=0.1)
    inputs = laid_out(make_inputs(case, executor.memory), layout)
    with executor():
        assert_parity(case, inputs, "cuda")


@needs_machine
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_switch_decides_at_each_call(switch, direction):
    case = Case((70,), 72, 136, 8)
    inputs = make_inputs(case)
    x = inputs.x.requires_grad_()
    machine = Machine()
    for precision in ("highest", "high", "medium", "highest"):
        switch(precision if direction == "forward" else "highest")
        with using(machine):
            y = lk.lora_linear(x, inputs.weight, inputs.lora_A, inputs.lora_B, impl="cuda")
            switch(precision if direction == "backward" else "highest")
            y.backward(inputs.dy)
    names = [name.split("_") for name, _ in machine.stats]
    assert [name[1] for name in names] == ["forward", "backward"] * 4
    assert [name[3] for name in names if name[1] == direction] == ["float", "tf32", "tf32", "float"]
    assert {name[3] for name in names if name[1] != direction} == {"float"}


@needs_machine
def test_float32_by_itself_where_torch_forbids_it(switch):
    switch("highest")
    case = Case((129,), 136, 200, 24, dropout_p=0.1)
    with using(machine := Machine()):
        assert_parity(case, make_inputs(case), "cuda")
    assert all("tf32" not in name for name, _ in machine.stats)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_operands_are_rounded_to_nearest(executor):
    """Halfway between two numbers of TF32 and below: by dropped bits both were the lower one."""
    half = 2.0**-11
    x = torch.tensor([1 + half, 1 + half - 2.0**-23, -1 - half, float("inf"), float("nan")])
    rows, w, zero = torch.zeros(32, 8), torch.eye(8), torch.zeros(8, 8)
    rows[: len(x), 0] = x
    given = (t.to(executor.memory) for t in (rows, w, zero, zero))
    with executor():
        y = lk.lora_linear(*given, impl="cuda")[: len(x), 0].cpu()
    expected = [1 + 2 * half, 1.0, -1 - 2 * half, float("inf"), float("nan")]
    assert torch.equal(y[:3], torch.tensor(expected[:3]))
    assert not y[3:].isfinite().any()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_bias_gradient_is_a_sum_of_float32(switch, executor):
    case = Case((700,), 136, 72, 8)
    inputs = make_inputs(case, executor.memory)
    with executor():
        actual = run(case, inputs, "cuda", ("db", "dbias"))["dbias"]
    oracle = reference_results(case, inputs, torch.float64)["dbias"]
    eager = reference_results(case, inputs)["dbias"].double() - oracle
    assert_within_budget(actual, oracle, [eager], "dbias")


@needs_machine
def test_same_bits_whatever_the_schedule():
    """Also of sums over several segments of rows, and of launches that share flags."""
    case = Case((4300,), 72, 136, 5, dropout_p=0.1)
    inputs = make_inputs(case)
    zeros = torch.zeros(1024, dtype=torch.int32)
    runs = []
    for seed, resident in enumerate((5, 3, 7)):
        with using(Machine(resident=resident, seed=seed, zeros=zeros)):
            runs.append(run(case, inputs, "cuda"))
        assert not zeros.any()
    assert_results(case, inputs, runs[0], "cuda")
    for name, expected in runs[0].items():
        assert all(torch.equal(other[name], expected) for other in runs[1:]), name


@needs_machine
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("shared", [A100, RTX3090], ids=["A100", "RTX 3090"])
def test_no_bank_conflicts_and_whole_sectors(shared, rank, dropout_p):
    case = Case((256,), 512, 1024, rank, dropout_p=dropout_p)
    with using(machine := Machine(resident=4, shared_bytes=shared)):
        run(case, make_inputs(case), "cuda", ("dx",))
    assert {name.split("_")[1] for name, _ in machine.stats} == {"forward", "backward"}
    for name, stats in machine.stats:
        assert "_tf32_" in name
        assert stats.shared_bank_conflicts == 0, name
        assert min(stats.load_efficiency, stats.store_efficiency) > 0.95


@needs_machine
def test_infinite_gradients_of_a_bias():
    case = Case((40,), 16, 8, 1, bias=True)
    inputs = make_inputs(case)
    inputs.dy[3, 5], inputs.dy[7, 2], inputs.dy[9, 11] = float("inf"), -float("inf"), float("nan")
    with using(Machine()):
        actual = run(case, inputs, "cuda", ("dbias",))["dbias"]
    torch.testing.assert_close(actual, inputs.dy.sum(0), equal_nan=True)

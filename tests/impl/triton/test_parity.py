"""Triton kernels against the float64 reference, in whatever can run them here.

The interpreter needs TRITON_INTERPRET=1 (a process of its own), compiled code a PTX virtual
machine or a GPU. Every case draws fresh inputs; outputs start as NaN (conftest).
"""

from dataclasses import asdict
from functools import partial
from itertools import product

import pytest
import torch

from lora_kernels.impl.triton.plan.config import TILES_16
from lora_kernels.impl.triton.plan.device import known
from lora_kernels.testing import (
    Case,
    assert_parity,
    assert_results,
    float16_range_cases,
    make_inputs,
    run,
)
from tests.support.executors import (
    INTERPRETED,
    Interpreter,
    Machine,
    check_same_bits,
    executors,
    fixed_plan,
    needs_compiler,
    needs_machine,
    running,
)
from tests.support.implementations import linear_call
from tests.support.layouts import LAYOUTS, laid_out

pytestmark = [pytest.mark.many, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# The interpreter of Triton 3.8 computes products of bfloat16 wrongly.
DTYPES = (FP32, FP16) if INTERPRETED else (BF16, FP16, FP32, BF16)
SIZES = (64, 136, 200, 384)
PAIRS = list(product(SIZES, SIZES))


def _cases():
    """Every M with every R and dropout; N, K and dtype go round, so that all values meet."""
    for index, (m, r, p) in enumerate(
        product((1, 7, 64, 129, 300), (1, 5, 8, 16, 24, 64, 96), (0.0, 0.1))
    ):
        n, k = PAIRS[(5 * index + index // 16) % len(PAIRS)]
        dtype = DTYPES[(index // 2) % len(DTYPES)]
        adapters = FP32 if dtype != FP32 and index % 5 == 0 else None
        yield Case((m,), n, k, r, dtype, adapters, p, bias=index % 3 != 0)


CASES = list(_cases())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("executor", executors())
def test_sizes_ranks_and_dtypes(executor, case):
    chosen = executor()
    if isinstance(chosen, Machine):
        index = CASES.index(case)
        if chosen.target != 80 and index % 3 != (chosen.target == 100):
            pytest.skip("this architecture takes a third of the cases")
        chosen.resident, chosen.seed = 1 + index % 7, index
        chosen.weak = int(index % 9 < 3)  # a third, of each architecture
    with running(chosen):
        assert_parity(case, make_inputs(case, executor.memory), "triton")


@pytest.mark.parametrize("xa_columns", [0, 1], ids=["two launches", "one launch"])
@pytest.mark.parametrize("index", range(len(float16_range_cases((), 1, 1, 1))))
@pytest.mark.parametrize("executor", executors())
def test_float16_range(executor, index, xa_columns):
    """Three row panels of dxa, the last of few rows; in two launches ten smaller ones."""
    case = float16_range_cases((150,), 72, 136, (5, 24)[xa_columns])[index]
    with running(executor(plan=fixed_plan(xa_columns=xa_columns))):
        assert_parity(case, make_inputs(case, executor.memory), "triton")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("executor", executors())
def test_strided_tensors(executor, layout, dropout_p):
    case = Case((4, 33), 72, 136, 5, FP32 if INTERPRETED else BF16, dropout_p=dropout_p)
    inputs = laid_out(make_inputs(case, executor.memory), layout)
    with running(executor()):
        assert_parity(case, inputs, "triton")


def _scaling_in_memory(dtype, memory):
    case = Case((9,), 16, 24, 4, dtype, scaling=torch.tensor(1.7, device=memory))
    return case, make_inputs(case, memory)


def _expanded_gradient(dtype, memory):
    case = Case((6, 20), 48, 40, 8, dtype)
    inputs = make_inputs(case, memory)
    inputs.dy = inputs.x.new_ones(()).expand(6, 20, 48)
    return case, inputs


def _overlapping_rows(dtype, memory):
    """Rows that overlap, or are all one: no descriptor describes them."""
    case = Case((33,), 48, 64, 8, dtype)
    inputs = make_inputs(case, memory)
    inputs.x = inputs.x.flatten()[: 32 * 8 + 64].as_strided((33, 64), (8, 1))
    inputs.dy = inputs.dy[:1].expand(33, 48)
    return case, inputs


def _below_a_vector(m, n, k, r):
    def make(dtype, memory):
        case = Case((m,), n, k, r, dtype, dropout_p=0.1)
        return case, make_inputs(case, memory)

    return make


OTHER_TENSORS = {
    "scaling in memory": _scaling_in_memory,
    "expanded gradient": _expanded_gradient,
    "overlapping rows": _overlapping_rows,
    "1x1x1x1": _below_a_vector(1, 1, 1, 1),
    "3x1x7x1": _below_a_vector(3, 1, 7, 1),
    "2x129x3x2": _below_a_vector(2, 129, 3, 2),
}


@pytest.mark.parametrize("name", OTHER_TENSORS)
@pytest.mark.parametrize("executor", executors())
def test_other_tensors(executor, name):
    with running(executor()):
        case, inputs = OTHER_TENSORS[name](FP32 if INTERPRETED else BF16, executor.memory)
        assert_parity(case, inputs, "triton")


@pytest.mark.parametrize("executor", executors())
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize(
    "wanted", [("dx",), ("da",), ("db",), ("dbias",), ("da", "db"), ("dx", "dbias")]
)
def test_only_the_gradients_asked_for(executor, wanted, dropout_p):
    case = Case((70,), 72, 136, 8, FP32 if INTERPRETED else BF16, dropout_p=dropout_p)
    inputs = make_inputs(case, executor.memory)
    with running(executor()):
        actual = run(case, inputs, "triton", wanted)
    assert actual.keys() == {"y", *wanted}
    assert_results(case, inputs, actual, "triton")


@needs_machine
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("r", [64, 128])
@pytest.mark.parametrize("target", [80, 90, 100])
def test_bias_gradient_beside_large_ranks(target, r, descriptors):
    """Both take dy from shared memory, one by an asynchronous product on sm_90."""
    if descriptors and target == 80:
        pytest.skip("sm_80 has no tensor descriptors")
    plan = fixed_plan(num_warps=8, descriptors=descriptors)
    case = Case((300,), 256, 136, r, BF16, dropout_p=0.1, bias=True)
    with running(Machine(target, resident=5, seed=r, plan=plan)):
        assert_parity(case, make_inputs(case), "triton")


TILES = list(product(TILES_16, (0, 1, 2, 4)))


def _name(tile, xa_columns):
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k}-{tile.num_warps}-{xa_columns}"


@needs_machine
@pytest.mark.parametrize("index", range(len(TILES)), ids=lambda i: _name(*TILES[i]))
@pytest.mark.parametrize("target", [80, 90, 100])
def test_every_shipped_tile(target, index):
    """Each in one launch by one, two and four xa columns and in two launches, by both copies."""
    tile, xa_columns = TILES[index]
    if target != 90 and tile.block_n > 128:
        pytest.skip("tiles of 256 columns are sm_90's")
    descriptors = target > 80 and index // 4 % 2 == 0
    fields = asdict(tile) | {"xa_columns": xa_columns, "descriptors": descriptors}
    n = max(280, tile.block_n * xa_columns - 24)
    case = Case((150,), n, 264, 24, BF16, dropout_p=0.1 * ((index // 4 + index) % 2))
    with running(Machine(target, resident=5, seed=index, plan=fixed_plan(**fields))):
        assert_parity(case, make_inputs(case), "triton")


@needs_machine
@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize(
    "threshold", [5, 20002, 0x7F80, 0x7F81, 0x7FFF, 0x8000, 0x8001, 50003, 65535]
)
def test_mask_is_the_public_one(target, threshold):
    """xa of a unit matrix is D(x) itself: every element tells whether it was kept.

    With this seed some lanes are the threshold itself, or one less (65535).
    """
    import lora_kernels as lk
    from lora_kernels.registration import operators

    x = torch.ones(3000, 40, dtype=BF16)
    weight, b = torch.zeros(24, 40, dtype=BF16), torch.zeros(24, 40, dtype=BF16)
    seed = torch.tensor(-3)
    with running(Machine(target)):
        call = linear_call(weight, torch.eye(40, dtype=BF16), b, None, seed, 1.0, threshold)
        _, xa = operators("lora_linear", "triton").forward(x, *call.flat())
    assert torch.equal(xa != 0, lk.dropout_mask(x.shape, threshold / 65536, seed))


@needs_machine
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("xa_columns", [2, 4])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("r", [5, 16, 64])
@pytest.mark.parametrize("target", [80, 90, 100])
def test_parts_of_xa_are_handed_on(target, r, dtype, xa_columns, dropout_p):
    """By two and four parts of five steps; the last of four is empty."""
    plan = fixed_plan(xa_columns=xa_columns)
    rows = 65 if dtype == FP32 else 129  # float32 takes longest to execute
    case = Case((rows,), 256, 264, r, dtype, dropout_p=dropout_p)
    with running(Machine(target, resident=xa_columns + r % 3, seed=r, plan=plan)):
        assert_parity(case, make_inputs(case), "triton")


@needs_machine
@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
def test_same_bits_whatever_the_schedule(target, dropout_p):
    case = Case((300,), 200, 384, 24, BF16, FP32, dropout_p)
    check_same_bits(case, partial(Machine, target))


@needs_machine
@pytest.mark.parametrize("target", [80, 90, 100])
def test_workspace_is_left_as_found(target):
    case = Case((300,), 136, 200, 16, BF16, dropout_p=0.1)
    with running(Machine(target)) as machine:
        for _ in range(3):
            assert_parity(case, make_inputs(case), "triton")
    assert not machine.workspace.zeros(1, torch.device("cpu")).any()


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_counters_beyond_32_bits():
    """The variant for more than 2³² counters gives the same mask below them."""

    class Wide(Interpreter):
        def run(self, kernel, grid, args, constants, how):
            mode = constants["MODE"]._replace(WIDE=True)
            super().run(kernel, grid, args, constants | {"MODE": mode}, how)

    case = Case((65,), 40, 72, 8, FP32, dropout_p=0.3)
    with running(Wide()):
        assert_parity(case, make_inputs(case), "triton")


@needs_compiler
def test_few_variants_in_a_training_run():
    """Batch shapes of a training run share one kernel a layer shape and mode."""
    a, b = torch.zeros(16, 1024), torch.zeros(1024, 16)
    weight = torch.zeros(1024, 1024, dtype=BF16)
    from lora_kernels.impl.triton.tools.compiler import variant
    from lora_kernels.impl.triton.tools.inspect import code_of
    from lora_kernels.impl.triton.tools.record import Recorder
    from lora_kernels.ops.linear import lora_linear

    recorder = Recorder(known("NVIDIA H100 80GB HBM3"))
    with running(recorder):
        for m in (4096, 4095, 3001, 2560, 3777, 4000):
            for p in (0.0, 0.05):
                x = torch.zeros(m, 1024, dtype=BF16, requires_grad=True)
                y = lora_linear(
                    x, weight, a.requires_grad_(), b.requires_grad_(), scaling=1 + m / 1e4,
                    dropout_p=p, training=True, impl="triton",
                )  # fmt: skip
                y.backward(y)
    variants = {variant(*code_of(launch)) for launch in recorder.launches}
    assert len(variants) == 4  # forward and backward, with and without dropout

"""What Triton's kernels have beside tests/ops/test_parity.py: plans, tiles, schedules, flags.

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
    float16_range_cases,
    make_inputs,
)
from tests.support.executors import (
    INTERPRETED,
    PLANS,
    Interpreter,
    Machine,
    check_same_bits,
    executors,
    fixed_plan,
    needs_compiler,
    needs_machine,
    own_plan,
    running,
)
from tests.support.implementations import linear_call

pytestmark = [pytest.mark.many, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("xa_columns", [0, 1], ids=["two launches", "one launch"])
@pytest.mark.parametrize("index", range(len(float16_range_cases((), 1, 1, 1))))
@pytest.mark.parametrize("executor", executors())
def test_float16_range(executor, index, xa_columns):
    """Three row panels of dxa, the last of few rows; in two launches ten smaller ones."""
    case = float16_range_cases((150,), 72, 136, (5, 24)[xa_columns])[index]
    with running(executor(plan=fixed_plan(xa_columns=xa_columns))):
        assert_parity(case, make_inputs(case, executor.memory), "triton")


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
    # Of float32 smaller tiles: larger ones take 40 s to compile.
    m, k, tile = (33, 136, {"block_m": 32, "block_k": 32}) if dtype == FP32 else (129, 264, {})
    plan = fixed_plan(xa_columns=xa_columns, **tile)
    case = Case((m,), 256, k, r, dtype, dropout_p=dropout_p)
    with running(Machine(target, resident=xa_columns + r % 3, seed=r, plan=plan)):
        assert_parity(case, make_inputs(case), "triton")


@pytest.mark.slow
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
    with running(Machine(target, plan=own_plan)) as machine:
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
    for plan in PLANS:
        with running(Wide(plan=plan)):
            assert_parity(case, make_inputs(case), "triton")


# Own products: forward and backward. Library plan: shrink, expand, and the passes over dy and x; D
# matters to the first and the last.
@needs_compiler
@pytest.mark.parametrize(("plan", "kernels"), [*zip(PLANS, (4, 6), strict=True)])
def test_few_variants_in_a_training_run(plan, kernels):
    """Batch shapes of a training run share one kernel a layer shape and mode."""
    a, b = torch.zeros(16, 1024), torch.zeros(1024, 16)
    weight = torch.zeros(1024, 1024, dtype=BF16)
    from lora_kernels.impl.triton.tools.compiler import variant
    from lora_kernels.impl.triton.tools.inspect import code_of
    from lora_kernels.impl.triton.tools.record import Recorder
    from lora_kernels.ops.linear import lora_linear

    recorder = Recorder(known("NVIDIA H100 80GB HBM3"))
    recorder.plan = plan
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
    assert len(variants) == kernels

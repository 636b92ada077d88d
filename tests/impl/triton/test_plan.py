"""The picker: a pure function of the layer and the GPU, tested without either."""

from itertools import product

import pytest
import torch

import lora_kernels as lk
from lora_kernels.impl.executor import using
from lora_kernels.impl.triton.plan.config import (
    Config,
    LibraryConfig,
    Problem,
    illegal,
    library_alone,
    problem_of,
    shared_bytes,
    shipped,
)
from lora_kernels.impl.triton.plan.cost import frozen_seconds, seconds
from lora_kernels.impl.triton.plan.device import KNOWN, estimated, known
from lora_kernels.impl.triton.plan.plan import fastest_config, plan, plan_of
from tests.support.executors import own_plan

UNKNOWN = estimated("a GPU of tomorrow", (13, 1), 100)
DEVICES = [*KNOWN, UNKNOWN, estimated("a small one", (8, 7), 16)]
LAYERS = [
    Problem(m, n, k, r, bits, dropout, True, backward)
    for m in (1, 64, 300, 8192)
    for n, k in ((4096, 4096), (1024, 200), (14336, 4096), (64, 64))
    for r in (1, 16, 64, 256)
    for bits in (16, 32)
    for dropout in (False, True)
    for backward in (False, True)
]


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_every_layer_has_a_legal_plan_everywhere(device):
    for problem in LAYERS:
        chosen, own = plan(problem, device), own_plan(problem, device)
        assert illegal(own.config, problem._replace(m=1 << 14), device) is None
        assert shared_bytes(own.config, problem, device) <= device.shared_bytes
        assert (own.shrink is not None) == (own.config.xa_columns == 0)
        assert chosen.seconds <= chosen.predicted.library <= chosen.predicted.peft
        assert chosen.predicted.frozen <= chosen.predicted.library


def test_rank_beyond_the_limit_is_an_error():
    with pytest.raises(ValueError, match="problem: expected"):
        plan(Problem(64, 64, 64, 257, 16), KNOWN[0])


@pytest.mark.parametrize(
    ("name", "descriptors"),
    [
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA L40S", False),
        ("NVIDIA GeForce RTX 4090", False),
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H200", True),
        ("NVIDIA B200", True),
    ],
)
def test_one_launch_takes_large_tiles(name, descriptors):
    device = known(name)
    for backward in (False, True):
        problem = Problem(8192, 4096, 4096, 16, 16, not backward, True, backward)
        chosen = fastest_config(problem, device)
        # On sm_90 there are registers for more.
        assert (chosen.block_m, chosen.block_n) == (128, 256 if device.wgmma else 128)
        assert chosen.xa_columns >= 1
        assert chosen.descriptors == descriptors


@pytest.mark.parametrize(("r", "dropout"), [(16, True), (24, False), (5, True)])
def test_what_a_gpu_computed_wrongly_is_the_librarys(r, dropout):
    problem = Problem(8192, 14336, 4096, r, 16, dropout, True, True)
    for name in FOUR:
        assert "wrong on a GPU" in library_alone(problem, known(name))
        assert isinstance(plan(problem, known(name)).config, LibraryConfig)
    assert library_alone(problem._replace(backward=False), known(FOUR[2])) is None


FOUR = (
    "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3", "NVIDIA B200"
)  # fmt: skip


@pytest.mark.parametrize("dropout", [False, True], ids=["p0", "p"])
@pytest.mark.parametrize("name", FOUR)
def test_auto_is_never_above_peft_and_near_the_frozen_layer(name, dropout):
    """Forward and backward together; at most 1.20 of the frozen layer at 8192 x 4096 x 4096."""
    for m, (n, k) in product(
        (1, 16, 512, 2048, 8192), ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
    ):
        both = [
            plan(Problem(m, n, k, 16, 16, dropout, backward=backward), known(name))
            for backward in (False, True)
        ]
        for chosen in both:
            assert chosen.seconds <= chosen.predicted.peft
        if (m, n, k) == (8192, 4096, 4096):
            frozen = sum(chosen.predicted.frozen for chosen in both)
            assert sum(chosen.seconds for chosen in both) <= 1.20 * frozen


# GPU, M, N, K, whether the library plan is taken in both directions.
TABLE = [
    *((name, 8192, n, k, True) for name in FOUR for n, k in ((4096, 4096), (14336, 4096))),
    *((name, 8192, 1024, 4096, True) for name in (FOUR[0], FOUR[3])),
    *(("NVIDIA B200", m, 4096, 4096, True) for m in (256, 1024)),
    *((name, 512, 4096, 4096, True) for name in FOUR[:2]),
    ("NVIDIA H100 80GB HBM3", 8192, 1024, 4096, False),
    *((name, 1, 4096, 4096, False) for name in FOUR),
]


@pytest.mark.parametrize(("name", "m", "n", "k", "library"), TABLE)
def test_the_table_of_plans(name, m, n, k, library):
    """As computed from others' measurements, without dropout."""
    for backward in (False, True):
        chosen = plan(Problem(m, n, k, 16, 16, backward=backward), known(name))
        assert isinstance(chosen.config, LibraryConfig) == library


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_odd_layers_take_the_library_plan(device):
    """No kernel that is chosen loads single words in its main loop."""
    for k, n in product((130, 1000, 1024, 4097, 4104), (1024, 1032, 4095)):
        for dtype, m in product((torch.bfloat16, torch.float32), (1, 300, 8192)):
            x = torch.empty(m, k, dtype=dtype, device="meta")
            dy, weight, a = x.new_empty(m, n), x.new_empty(n, k), x.new_empty(16, k)
            own = [
                not isinstance(plan(problem, device).config, LibraryConfig)
                for problem in (
                    problem_of(x, weight, a, False),
                    problem_of(dy, weight, a, True, (True, True, True, False)),
                )
            ]
            multiple = 8 if device.descriptors else 16
            if dtype == torch.float32 or k % multiple:
                assert not any(own)
            if n % multiple:
                assert not own[1]


def test_other_layouts_take_the_library_plan():
    plain = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta")
    weight = plain.new_empty(4096, 4096)
    device = known("NVIDIA H100 80GB HBM3")
    assert library_alone(problem_of(plain, weight, plain, False), device) is None
    transposed = plain.new_empty(4096, 4096).t()
    assert "copied" in library_alone(problem_of(plain, transposed, plain, False), device)
    shifted = plain.new_empty(64, 4104)[:, 1:4097]
    assert "16 bytes" in library_alone(problem_of(shifted, weight, plain, False), device)


def test_tf32_is_no_reason_against_one_launch():
    problem = Problem(64, 4096, 4096, 16, 32)
    for device in DEVICES:
        assert "float32" in library_alone(problem, device)
        assert library_alone(problem._replace(tf32=True), device) is None


@pytest.mark.parametrize(
    ("strides", "aligned"),
    [
        ((64, 1), True),
        ((72, 1), True),
        ((68, 1), False),  # 8 bytes beyond a multiple of 16
        ((0, 1), False),  # the gradient of y.sum(0)
        ((56, 1), False),  # rows that overlap
        ((1 << 38, 1), True),
        ((1 << 39, 1), False),
    ],
    ids=str,
)
def test_descriptors_describe_what_a_driver_takes(strides, aligned):
    x = torch.empty_strided((5, 64), strides, dtype=torch.bfloat16, device="meta")
    plain = x.new_empty(64, 64)
    assert problem_of(x, plain, plain, False).aligned == aligned
    assert problem_of(plain, x, plain, False).aligned == aligned


def test_a_tensor_that_starts_within_a_vector_has_no_descriptor():
    x = torch.zeros(5 * 64 + 8, dtype=torch.bfloat16)
    plain = torch.zeros(64, 64, dtype=torch.bfloat16)
    for offset in (0, 1, 4, 8):
        rows = x[offset : offset + 5 * 64].view(5, 64)
        assert problem_of(rows, plain, plain, False).aligned == (rows.data_ptr() % 16 == 0)


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200"])
@pytest.mark.parametrize("m", [1, 8, 16])
def test_decoding_streams_the_weight_with_most_multiprocessors(name, m):
    device = known(name)
    config = fastest_config(Problem(m, 4096, 4096, 16, 16), device)
    assert config.block_m <= 32
    assert 4096 // config.block_n >= device.multiprocessors / 2.5


def test_costs_grow_with_the_work():
    device = known("NVIDIA H200")
    config = Config(128, 128, 64, 8, 3, 1, True)
    base = Problem(4096, 4096, 4096, 16, 16)
    for field in ("m", "n", "k"):
        larger = base._replace(**{field: 8192})
        assert seconds(config, larger, device) > 1.5 * seconds(config, base, device)
        assert frozen_seconds(larger, device) > 1.5 * frozen_seconds(base, device)
    assert seconds(config, base._replace(dropout=True), device) > seconds(config, base, device)


def test_batch_sizes_of_one_power_share_a_plan():
    device = known("NVIDIA H200")
    plans = {plan(Problem(m, 4096, 4096, 16, 16), device) for m in range(2049, 4097, 31)}
    assert len(plans) == 1


def test_illegal_says_why():
    device, problem = known("NVIDIA L40S"), Problem(512, 1024, 1024, 16, 16)
    tile = Config(128, 128, 64, 8, 3)
    for config, at, reason in (
        (Config(128, 128, 64, 8, 3, 1, True), problem, "descriptors"),
        (Config(128, 128, 64, 8, 9), problem, "shared memory"),
        (Config(128, 128, 64, 8, 3, 16), problem, "xa columns"),
        (Config(128, 128, 64, 8, 3, 4), problem._replace(k=190), "4 parts of 3 steps"),
        (Config(128, 128, 64, 8, 3, 2), problem._replace(backward=True), "dxa"),
        (tile, problem._replace(r=300), "rank 300"),
        (Config(128, 128, 32, 2, 3), problem, "spill"),
    ):
        assert reason in (illegal(config, at, device) or "")
    assert illegal(tile, problem, device) is None
    alone = estimated("one", (8, 0), 1)
    assert "together" in (illegal(Config(128, 128, 64, 8, 3, 2), problem, alone) or "")


def test_partial_sums_stay_small():
    config = Config(128, 128, 64, 8, 3)
    for m, n, k, r in ((8192, 4096, 4096, 16), (65536, 14336, 4096, 64), (512, 1024, 1024, 16)):
        problem = Problem(m, n, k, r, 16, backward=True)
        segment = plan_of(config, problem, known("NVIDIA H200")).segment_of(m)
        assert segment <= -(-m // config.block_m) * config.block_m
        assert segment % config.block_m == 0
        parts = -(-m // segment)
        written = 0 if parts == 1 else 8 * parts * (n + k) * r
        assert written <= 0.03 * 2 * (m * (2 * n + 2 * k) + n * k)


class Planner:
    impl = "triton"
    plan = staticmethod(plan)

    def device(self, tensor):
        return known("NVIDIA H200")


@pytest.mark.parametrize(
    "function", [lk.lora_linear, lk.lora_dora_linear], ids=lambda f: f.__name__
)
def test_explain_prints_the_plan_and_what_each_would_take(function):
    shapes = ((512, 256), (128, 256), (8, 256), (128, 8), (128,))
    dora = function is lk.lora_dora_linear
    tensors = [torch.empty(s, dtype=torch.bfloat16) for s in shapes[: 4 + dora]]
    with using(Planner()):
        explanation = lk.explain(function, *tensors)
    if explanation.choice == "triton":  # not where triton isn't installed
        assert explanation.plans.keys() == {"forward", "backward"}
        assert all(("DoRA" in text) is dora for text in explanation.plans.values())
        for word in ("predicted", "frozen", "PEFT", "library", "one launch"):
            assert word in str(explanation)


def test_shipped_is_a_list_of_distinct_configurations():
    for problem in LAYERS[:4]:
        found = shipped(problem)
        assert len(set(found)) == len(found)

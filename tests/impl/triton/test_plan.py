"""The picker: a pure function of the layer and the GPU, tested without either."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.impl.executor import using
from lora_kernels.impl.triton.plan.config import (
    Config,
    Problem,
    illegal,
    problem_of,
    shared_bytes,
    shipped,
)
from lora_kernels.impl.triton.plan.cost import floor_seconds, seconds
from lora_kernels.impl.triton.plan.device import KNOWN, estimated, known
from lora_kernels.impl.triton.plan.plan import plan, plan_of

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
        chosen = plan(problem, device)
        assert illegal(chosen.config, problem._replace(m=1 << 14), device) is None
        assert shared_bytes(chosen.config, problem, device) <= device.shared_bytes
        assert (chosen.shrink is not None) == (chosen.config.xa_columns == 0)
        assert chosen.floor <= chosen.seconds


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
def test_training_shapes_take_one_launch_of_large_tiles(name, descriptors):
    device = known(name)
    for backward in (False, True):
        chosen = plan(Problem(8192, 4096, 4096, 16, 16, True, True, backward), device).config
        # On sm_90 there are registers for more.
        assert (chosen.block_m, chosen.block_n) == (128, 256 if device.wgmma else 128)
        assert chosen.xa_columns >= 1
        assert chosen.descriptors == descriptors


def test_unaligned_rows_take_pointers():
    chosen = plan(Problem(8192, 4096, 4097, 16, 16, aligned=False), known("NVIDIA H200"))
    assert not chosen.config.descriptors


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
    config = plan(Problem(m, 4096, 4096, 16, 16), device).config
    assert config.block_m <= 32
    assert 4096 // config.block_n >= device.multiprocessors / 2.5


def test_costs_grow_with_the_work():
    device = known("NVIDIA H200")
    config = Config(128, 128, 64, 8, 3, 1, True)
    base = Problem(4096, 4096, 4096, 16, 16)
    for field in ("m", "n", "k"):
        larger = base._replace(**{field: 8192})
        assert seconds(config, larger, device) > 1.5 * seconds(config, base, device)
        assert floor_seconds(larger, device) > 1.5 * floor_seconds(base, device)
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


def test_explain_prints_plan_prediction_and_floor():
    class Planner:
        impl = "triton"
        plan = staticmethod(plan)

        def device(self, tensor):
            return known("NVIDIA H200")

    tensors = [torch.empty(s, dtype=torch.bfloat16) for s in ((512, 256), (128, 256), (8, 256))]
    with using(Planner()):
        explanation = lk.explain(*tensors, torch.empty(128, 8, dtype=torch.bfloat16))
    if explanation.choice == "triton":  # not where triton isn't installed
        assert explanation.plans.keys() == {"forward", "backward"}
        assert "predicted" in str(explanation)
        assert "floor" in str(explanation)


def test_shipped_is_a_list_of_distinct_configurations():
    for problem in LAYERS[:4]:
        found = shipped(problem)
        assert len(set(found)) == len(found)

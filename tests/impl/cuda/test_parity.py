"""What the CUDA kernels have beside tests/ops/test_parity.py: ranks, rows, flags, counts.

Every case draws fresh inputs; what the library allocates starts as NaN.
"""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.impl.cuda.tools.machine import Machine
from lora_kernels.impl.executor import using
from lora_kernels.registration import operators
from lora_kernels.testing import (
    GRADIENTS,
    Case,
    assert_parity,
    assert_results,
    make_inputs,
    run,
)
from tests.ops.test_checks import UNKNOWN, refuses_unknown_formats
from tests.support.cuda_executors import A100, EXECUTORS, RTX3090, needs_machine, needs_part
from tests.support.implementations import linear_call

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = [
    pytest.mark.many,
    needs_part,
]


def kinds_of(machine):
    """Return what each launch was of: "forward", "backward"."""
    return [name.split("_")[1] for name, _ in machine.stats]


@pytest.mark.parametrize("threshold", [5, 20002, 0x7FFF, 0x8000, 0x8001, 50003, 65535])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_mask_is_the_public_one(executor, dtype, threshold):
    """xa of a unit matrix is D(x) itself: every element tells whether it was kept.

    With this seed some lanes are the threshold itself, or one less (65535).
    """
    x = torch.ones(3000, 40, dtype=dtype, device=executor.memory)
    weight, b, unit = x.new_zeros(24, 40), x.new_zeros(24, 40), torch.eye(40, out=x.new_empty(0))
    seed = torch.tensor(-3, device=executor.memory)
    with executor():
        call = linear_call(weight, unit, b, None, seed, 1.0, threshold)
        _, xa = operators("lora_linear", "cuda").forward(x, *call.flat())
    assert torch.equal(xa != 0, lk.dropout_mask(x.shape, threshold / 65536, seed, x.device))


@pytest.mark.parametrize("adapter_dtype", [None, FP32], ids=str)
@pytest.mark.parametrize("rank", [1, 24, 96])
@pytest.mark.parametrize("m", [1, 7, 16])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_few_rows_are_within_the_budget(executor, m, rank, adapter_dtype):
    """K beyond what one program's warps take at a time, and not a multiple of a step's."""
    case = Case((m,), 200, 1352, rank, (BF16, FP16)[m % 2], adapter_dtype, bias=rank > 1)
    with executor(resident=1 + m % 5, seed=rank):
        assert_parity(case, make_inputs(case, executor.memory), "cuda")


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize(
    ("rank", "adapter_dtype"), [(1, BF16), (24, None), (96, BF16), (250, None)], ids=str
)
@pytest.mark.parametrize("m", [1, 7, 8, 13, 16])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_decoding_float32(executor, m, rank, adapter_dtype, precision, float32_precision):
    """By plain products, and by TF32 where torch allows it; no multiples of a step's columns."""
    case = Case((m,), 200, 1364, rank, FP32, adapter_dtype, bias=rank > 1)
    float32_precision(precision)
    with executor(resident=1 + m % 5, seed=rank):
        assert_parity(case, make_inputs(case, executor.memory), "cuda")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_decoding_sums_no_long_chains(executor):
    """Each warp of the only program takes 1024 columns."""
    case = Case((16,), 64, 8192, 4, FP32)
    with executor(resident=1):
        assert_parity(case, make_inputs(case, executor.memory), "cuda")


@needs_machine
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_decoding_is_one_launch_that_reads_the_weight_once(dtype):
    case = Case((8,), 512, 2048, 16, dtype)
    machine = Machine(resident=6, zeros=torch.zeros(64, dtype=torch.int32))
    inputs = make_inputs(case)
    adapter = (inputs.weight, inputs.lora_A, inputs.lora_B)
    with using(machine):
        first, second = (lk.lora_linear(inputs.x, *adapter, impl="cuda") for _ in range(2))
    assert torch.equal(first, second)
    assert not machine.zeros.any()
    kind = {BF16: "bf16", FP32: "float"}[dtype]
    assert [name for name, _ in machine.stats] == [f"lora_few_rows_{kind}"] * 2
    assert machine.stats[0][1].shared_bank_conflicts == 0
    loaded = 32 * machine.stats[0][1].data["global_load_sectors"]
    once = dtype.itemsize * (512 * 2048 + 16 * 2048)
    # Each tile of 32 rows of W reads all rows of x, and its epilogue xa and B.
    assert loaded < 1.55 * once
    assert machine.stats[0][1].load_efficiency > 0.95


@needs_machine
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
def test_same_bits_whatever_the_schedule(dropout_p):
    """Sums over rows are of three segments here, whichever of them is finished last."""
    case = Case((4300,), 72, 136, 5, BF16, FP32, dropout_p)
    inputs = make_inputs(case)
    runs = []
    for resident, seed in ((5, 1), (3, 2), (7, 3)):
        with using(Machine(resident=resident, seed=seed)):
            runs.append(run(case, inputs, "cuda"))
    assert_results(case, inputs, runs[0], "cuda")
    for other in runs[1:]:
        for name, expected in runs[0].items():
            assert torch.equal(other[name], expected), name


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("rank", [65, 130, 256])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_ranks_in_slices(executor, dtype, rank, precision, float32_precision):
    """Each of the first columns of tiles makes a slice of xa or dxa, in one launch each.

    With two programs there are fewer than slices, which tiles of their own make then.
    """
    float32_precision(precision)
    case = Case((150,), 520, 584, rank, dtype, FP32 if rank == 130 else None, 0.1, bias=True)
    for resident in (2, 8, 9):
        with executor(resident=resident, seed=rank) as machine:
            assert_parity(case, make_inputs(case, executor.memory), "cuda")
            if machine is not None:
                assert kinds_of(machine) == ["forward", "backward"]


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("wanted", [("da",), ("da", "db", "dbias"), ("dx", "da", "db")], ids=str)
@pytest.mark.parametrize(("n", "k", "rank"), [(72, 40, 200), (71, 41, 65), (264, 520, 24)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_shrink_products_alone(executor, dtype, n, k, rank, wanted, precision, float32_precision):
    """Where dx isn't wanted, or columns are fewer than slices: first tiles of the same launch."""
    float32_precision(precision)
    case = Case((150,), n, k, rank, dtype, dropout_p=0.1, bias="dbias" in wanted)
    for resident in (1, 3, 8):
        with executor(resident=resident, seed=rank) as machine:
            inputs = make_inputs(case, executor.memory)
            assert_results(case, inputs, run(case, inputs, "cuda", wanted), "cuda")
            if machine is not None:
                assert kinds_of(machine) == ["forward", "backward"]


@needs_machine
@pytest.mark.parametrize("wanted", [GRADIENTS, ("dx",), ("da",)], ids=str)
@pytest.mark.parametrize("rank", [16, 100, 250])
def test_flags_are_left_as_found(rank, wanted):
    case = Case((300,), 136, 200, rank, BF16, dropout_p=0.1)
    machine = Machine(resident=6, zeros=torch.zeros(1024, dtype=torch.int32))
    with using(machine):
        for _ in range(3):
            inputs = make_inputs(case)
            assert_results(case, inputs, run(case, inputs, "cuda", wanted), "cuda")
    assert not machine.zeros.any()
    assert kinds_of(machine) == ["forward", "backward"] * 3


@needs_machine
@pytest.mark.parametrize("resident", [1, 2, 3, 17])
@pytest.mark.parametrize(("dtype", "dropout_p"), [(BF16, 0.0), (BF16, 0.1), (FP32, 0.1)], ids=str)
def test_any_number_of_running_programs_makes_progress(dtype, dropout_p, resident):
    """Of 17 that are launched; on weak memory, by several schedules, on the same flags.

    Shrink products by tiles of one column, of several, and alone.
    """
    flags = torch.zeros(1024, dtype=torch.int32)
    how = {"multiprocessors": 17, "zeros": flags, "weak": 1}
    for n, k, rank, together in ((264, 72, 8, 1), (264, 136, 100, 4), (72, 40, 130, 1)):
        case = Case((300,), n, k, rank, dtype, dropout_p=dropout_p, bias=True)
        with using(Machine(resident=max(resident, together), seed=rank + resident, **how)):
            assert_parity(case, make_inputs(case), "cuda")
    assert not flags.any()


@needs_machine
@pytest.mark.parametrize("resident", [1, 2, 3, 17])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_any_number_of_running_programs_decodes(dtype, resident):
    case = Case((5,), 520, 2048, 24, dtype, bias=True)
    flags = torch.zeros(1024, dtype=torch.int32)
    how = {"multiprocessors": 17, "zeros": flags, "weak": 1}
    for seed in range(2):
        with using(machine := Machine(resident=resident, seed=seed, **how)):
            assert_parity(case, make_inputs(case), "cuda")
        assert machine.stats[0][0].startswith("lora_few_rows_")
    assert not flags.any()


@needs_machine
def test_the_machine_refuses_columns_that_it_can_not_run_together():
    case = Case((150,), 264, 136, 100, BF16)
    with (
        using(Machine(resident=1, multiprocessors=17)),
        pytest.raises(RuntimeError, match="together: expected at most 1 programs, the resident"),
    ):
        run(case, make_inputs(case), "cuda")


@needs_machine
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shared", [A100, RTX3090], ids=["A100", "RTX 3090"])
def test_no_bank_conflicts_and_whole_sectors(shared, dtype, rank, dropout_p):
    """Matrix loads, copies and stores of tiles take as few passes and sectors as they can."""
    case = Case((256,), 512, 1024, rank, dtype, dropout_p=dropout_p)
    machine = Machine(resident=4, shared_bytes=shared)
    with using(machine):
        run(case, make_inputs(case), "cuda", ("dx",))
    for name, stats in machine.stats:
        assert stats.shared_bank_conflicts == 0, name
        assert min(stats.load_efficiency, stats.store_efficiency) > 0.95


@needs_machine
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_no_bank_conflicts_and_whole_sectors_of_shrink_products_alone(dtype, dropout_p):
    inputs = make_inputs(Case((256,), 64, 1024, 256, dtype))
    adapter = (inputs.weight, inputs.lora_A, inputs.lora_B)
    with using(machine := Machine(resident=4)):
        lk.lora_linear(inputs.x, *adapter, dropout_p=dropout_p, training=True, impl="cuda")
    ((name, stats),) = machine.stats
    assert "forward" in name
    assert stats.shared_bank_conflicts == 0
    assert min(stats.load_efficiency, stats.store_efficiency) > 0.95


@needs_machine
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize(
    ("dtype", "precision"), [(BF16, "highest"), (FP32, "highest"), (FP32, "high")], ids=str
)
def test_sums_over_more_rows_have_no_more_bank_conflicts(
    dtype, precision, dropout_p, float32_precision
):
    """Results of sums are put in order with a few; their loops have none."""
    float32_precision(precision)
    conflicts = []
    for rows in (256, 768):
        case = Case((rows,), 256, 256, 16, dtype, dropout_p=dropout_p)
        with using(machine := Machine(resident=4)):
            run(case, make_inputs(case), "cuda")
        conflicts.append(machine.stats[-1][1].shared_bank_conflicts)
    assert conflicts[0] == conflicts[1]


@needs_machine
@pytest.mark.parametrize(("dropout_p", "most"), [(0.0, 1.03), (0.1, 1.24)])
def test_main_loop_costs_little_more_than_without_an_adapter(dropout_p, most):
    """Instructions a matrix product of eight columns of tiles, over those of a tile of one more.

    Differences of two depths: the loop's own; of one column and of two: a plain tile's. One
    program, which waits for nobody; with dropout it draws the mask before, which is counted here.
    """

    def counts(n, k):
        case = Case((128,), n, k, 16, BF16, dropout_p=dropout_p)
        inputs = make_inputs(case)
        with using(machine := Machine(resident=1)):
            lk.lora_linear(
                inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B,
                dropout_p=dropout_p, training=True, impl="cuda",
            )  # fmt: skip
        ((name, stats),) = machine.stats
        assert "_forward_Wide_" in name
        return torch.tensor([stats.warp_instructions, stats.mma_instructions])

    one, two = (counts(n, 1024) - counts(n, 512) for n in (256, 512))
    eight = one + 7 * (two - one)
    (all_of, products), (bare, bare_products) = eight.tolist(), (two - one).tolist()
    assert all_of / products <= most * bare / bare_products


def test_what_it_refuses():
    with pytest.raises(ValueError, match="'cuda' can't serve this call: needs a CUDA device"):
        run(case := Case((2,), 8, 8, 2, BF16), make_inputs(case), "cuda")
    with using(Machine()):
        with pytest.raises(ValueError, match=r"needs float16, .* got torch\.float64"):
            run(case := Case((2,), 8, 8, 2, torch.float64), make_inputs(case), "cuda")
        with pytest.raises(ValueError, match="needs a rank of at most 256, got 300"):
            run(case := Case((2,), 8, 8, 300, BF16), make_inputs(case), "cuda")


@needs_machine
@pytest.mark.parametrize("what", UNKNOWN)
def test_a_format_that_it_does_not_know(what):
    with using(Machine()):
        refuses_unknown_formats("cuda", what)

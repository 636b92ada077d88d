"""W in four bits in the CUDA kernels: its bits as the format defines them, calls in the budget."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.impl import executor
from lora_kernels.impl.cuda.tools import machine
from lora_kernels.impl.cuda.tools.machine import Machine
from lora_kernels.impl.executor import using
from lora_kernels.registration import operators
from lora_kernels.testing import Case, assert_results, make_inputs, run
from tests.support.cuda_executors import EXECUTORS, needs_machine, needs_part
from tests.support.cuda_mutations import mutated_ptx
from tests.support.implementations import linear_call, needs_compiled_machine
from tests.support.quantised import bits, drawn, expected

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = [pytest.mark.many, needs_part]
NAMES = ("nf4", "nf4-nested", "fp4")
# N, K and block. Whole steps of columns; a step that ends inside, at a half of a thread's piece or
# between two; blocks that are halves of a piece, or begin in its middle; rows that begin inside a
# block, or inside a byte; one element; one block for all.
SHAPES = (
    (33, 512, 64), (40, 320, 128), (9, 608, 128), (5, 288, 32), (6, 256, 4096),
    (17, 200, 64), (10, 77, 32), (3, 33, 64), (1, 1, 32),
)  # fmt: skip


def decoded(weight, dtype, memory):
    """Return W by the definition; a weight's tensors may lie on a GPU."""
    parts = tuple(part.cpu() for part in weight.parts)
    known = type(weight).of_form(weight.form, weight.stored.cpu(), parts)
    return expected(known, dtype).to(memory)


def columns_by_few_rows(weight, columns, dtype):
    """Return columns of W: the product with rows of the identity, 16 at a time."""
    n, k = weight.shape
    a, b = (torch.empty(s, dtype=dtype, device=weight.stored.device) for s in ((0, k), (n, 0)))
    found = []
    for some in columns.split(16):
        x = torch.zeros(some.numel(), k, dtype=dtype, device=a.device)
        x[torch.arange(some.numel()), some] = 1
        found.append(lk.lora_linear(x, weight, a, b, impl="cuda").T)
    return torch.cat(found, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_few_rows_multiply_by_the_bits_of_the_definition(executor, name, shape):
    n, k, block = shape
    dtype = (BF16, FP16)[(SHAPES.index(shape) + NAMES.index(name)) % 2]
    weight = drawn(name, n, k, block, executor.memory)
    # Some at both ends, and of each eight about one.
    columns = torch.cat((torch.arange(0, k, 9), torch.arange(3), torch.arange(k - 3, k)))
    columns = columns[(columns >= 0) & (columns < k)].unique()
    with executor(resident=3) as machine:
        found = columns_by_few_rows(weight, columns, dtype)
    assert torch.equal(bits(found), bits(decoded(weight, dtype, executor.memory)[:, columns]))
    if machine is not None:
        scales = "nested" if "nested" in name else "flat"
        kernel = f"lora_few_rows_{scales}_{'bf16' if dtype == BF16 else 'half'}"
        assert {name for name, _ in machine.stats} == {kernel}


def assert_within_the_budget(executor, case, name, block=64, **how):
    """Check a case with W of a format; return the launches' names."""
    weight = drawn(name, case.n, case.k, block, executor.memory)
    inputs = make_inputs(case, executor.memory)
    known, given = (
        type(inputs)(**{**vars(inputs), "weight": w})
        for w in (decoded(weight, case.dtype, executor.memory), weight)
    )
    with executor(**how) as machine:
        assert_results(case, known, run(case, given, "cuda"), "cuda")
    return [] if machine is None else [name for name, _ in machine.stats]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case((1,), 72, 1056, 5, BF16, bias=True), "nf4"),
        (Case((7,), 40, 1352, 24, BF16, FP32), "nf4-nested"),
        (Case((2, 8), 200, 512, 96, FP16), "fp4"),
        (Case((16,), 33, 99, 1, FP16, FP32, bias=True), "nf4-nested"),
    ],
    ids=str,
)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_few_rows_are_within_the_budget(executor, case, name):
    """Backward decodes W to memory, where the dense kernel reads it."""
    made = assert_within_the_budget(executor, case, name, resident=5, seed=case.r)
    kinds = [name.split("_")[1] for name in made]
    assert kinds in ([], ["few", "decode", "backward"])


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case((17,), 72, 136, 8, BF16, dropout_p=0.1, bias=True), "nf4-nested"),
        (Case((5,), 24, 40, 3, BF16, dropout_p=0.1), "nf4"),
        (Case((2, 65), 41, 33, 8, FP16, FP32), "fp4"),
        (Case((9,), 24, 72, 4, FP32), "nf4-nested"),
        (Case((65,), 9, 67, 5, FP32, dropout_p=0.1, bias=True), "nf4"),
    ],
    ids=str,
)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_other_calls_decode_first(executor, case, name):
    """More rows, dropout, float32: in each direction W lies in memory for the call."""
    made = assert_within_the_budget(executor, case, name, 32, resident=3)
    assert [name.split("_")[1] for name in made][::2] in ([], ["decode", "decode"])


@pytest.mark.parametrize("shape", [(130, 260), (7, 33), (1, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_decoded_bits_are_the_definition(executor, name, shape):
    """dx of a unit matrix is W itself: backward's memory, of several programs or a part of one."""
    n, k = shape
    dtype = (BF16, FP16, FP32)[NAMES.index(name)]
    weight = drawn(name, n, k, 32, executor.memory)
    kept = [t.clone() for t in (weight.stored, *weight.parts)]
    x = torch.zeros(n, k, dtype=dtype, device=executor.memory, requires_grad=True)
    with executor(resident=2):
        y = lk.lora_linear(x, weight, x.new_empty(0, k), x.new_empty(n, 0), impl="cuda")
        (found,) = torch.autograd.grad(y, x, torch.eye(n, out=torch.empty_like(y)))
    assert torch.equal(bits(found), bits(decoded(weight, dtype, executor.memory)))
    for t, before in zip((weight.stored, *weight.parts), kept, strict=True):
        assert torch.equal(t, before)


@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_base_product_is_a_call_of_rank_0(executor, m):
    weight = drawn("nf4", 40, 96, device=executor.memory)
    w = decoded(weight, BF16, executor.memory)
    x = torch.randn(m, 96, device=executor.memory).to(BF16).requires_grad_()
    bias = torch.randn(40, device=executor.memory).to(BF16).requires_grad_()
    with executor():
        y = lk.lora_linear(x, weight, x.new_empty(0, 96), x.new_empty(40, 0), bias, impl="cuda")
        dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w, bias))
    torch.testing.assert_close(dx, w.sum(0, dtype=torch.float32).to(BF16).expand(m, 96))
    assert torch.equal(dbias, torch.full_like(bias, m))


@pytest.mark.parametrize("storage", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_codes_are_views_of_any_storage(executor, storage):
    """Bytes that are NaN in their owner's dtype, not at multiples of 16; scales that lie apart."""
    weight = drawn("nf4-nested", 16, 64, 64, executor.memory)
    padded = torch.cat((weight.stored.new_zeros(4), torch.full_like(weight.stored, 0xFF)))
    weight.stored = padded.view(storage)[4 // storage.itemsize :].view(torch.uint8)
    weight.parts = tuple(torch.stack((p, p), -1)[..., 0] for p in weight.parts)
    with executor():
        found = columns_by_few_rows(weight, torch.arange(64), BF16)
    assert torch.equal(bits(found), bits(decoded(weight, BF16, executor.memory)))


@needs_machine
@pytest.mark.parametrize("name", ["nf4", "nf4-nested"])
def test_few_rows_are_one_launch_that_reads_packed_bytes_once(name):
    """Differences of two sizes of W: x is read for each tile of 32 rows, by 16 rows of lanes."""
    loads = []
    for n in (256, 512):
        weight = drawn(name, n, 1024)
        x, a, b = (torch.randn(s).to(BF16) for s in ((16, 1024), (16, 1024), (n, 16)))
        machine = Machine(resident=6, zeros=torch.zeros(64, dtype=torch.int32))
        with using(machine):
            first, second = (lk.lora_linear(x, weight, a, b, impl="cuda") for _ in range(2))
        assert torch.equal(first, second)
        assert not machine.zeros.any()
        ((_, stats), (_, _)) = machine.stats
        assert stats.shared_bank_conflicts == 0
        loads.append(stats.data["global_load_bytes"])
    codes, blocks, tiles = 256 * 1024 // 2, 256 * 1024 // 64, 256 // 32
    of_scales = blocks * (1 + 4 + 4 + 4 if "nested" in name else 4)
    of_x, of_b = tiles * 16 * 1024 * 2, 16 * 256 * 16 * 2
    of_code = tiles * 256 * 16 * 4  # a thread reads it for each tile
    assert codes < loads[1] - loads[0] - of_scales - of_x - of_b - of_code < 1.2 * codes


@needs_machine
@pytest.mark.parametrize("resident", [1, 2, 17])
def test_any_number_of_running_programs_makes_progress(resident):
    """Of 17 that are launched, on weak memory, several a tile; whatever the schedule, y's bits."""
    weight, inputs = drawn("nf4-nested", 72, 2048), make_inputs(Case((5,), 72, 2048, 24, BF16))
    x, adapter = inputs.x, (inputs.lora_A, inputs.lora_B)
    flags, found = torch.zeros(64, dtype=torch.int32), []
    for seed in range(2):
        how = {"multiprocessors": 17, "resident": resident, "seed": seed, "weak": 1}
        with using(machine := Machine(zeros=flags, **how)):
            found.append(lk.lora_linear(x, weight, *adapter, impl="cuda"))
        assert not flags.any()
        assert machine.stats[0][0] == "lora_few_rows_nested_bf16"
    assert torch.equal(*found)
    wanted = lk.lora_linear(x, decoded(weight, BF16, "cpu"), *adapter, impl="eager")
    torch.testing.assert_close(found[0], wanted, rtol=0.02, atol=0.05)


@needs_machine
@pytest.mark.parametrize(
    ("which", "wrong", "message"),
    [
        (0, lambda t: t[1:], "weight: expected 256 elements, got 255"),
        (1, lambda t: t[1:], "absmax: expected 8 elements, got 7"),
        (1, lambda t: t.float(), "absmax: expected the dtype of its format"),
        (2, lambda t: t[:8], "code: expected 16 elements, got 8"),
        (3, lambda t: t[:255], "nested code: expected 256 elements, got 255"),
        (5, lambda t: t.new_empty(0), "nested offset: expected 1 elements, got 0"),
    ],
)
def test_sizes_are_checked_where_kernels_would_believe_them(which, wrong, message):
    """The library's own checks, below Python's: nothing is launched, so no executor is asked."""
    weight = drawn("nf4-nested", 8, 64)
    tensors = [weight.stored, *weight.parts]
    tensors[which] = wrong(tensors[which])
    bad = type(weight).of_form(weight.form, tensors[0], tuple(tensors[1:]))
    x, a, b = (torch.zeros(s, dtype=BF16) for s in ((3, 64), (2, 64), (8, 2)))
    call = linear_call(torch.empty(0), a, b)._replace(weight=bad)
    wanted = [True, False, False, False]
    forward, backward = operators("lora_linear", "cuda")
    on_gpus = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=message):
        forward.redispatch(on_gpus, x, *call.flat())
    with pytest.raises(RuntimeError, match=message):
        backward.redispatch(on_gpus, x[:, :8], x, None, *call.flat_backward(), wanted)


KERNELS = """
#include "../device/codes.cuh"
namespace lora_kernels {
extern "C" __global__ void lora_few_rows_flat_bf16(const __grid_constant__ CodedFewRowsParams p) {
  few_rows<__nv_bfloat16, false>(p);
}
}
"""
# name: (file, text, what stands there instead)
MUTANTS = {
    "nothing": ("codes.cuh", "0x4051", "0x4051"),
    "low nibble first": ("codes.cuh", "0x4051", "0x5140"),
    "low nibble first, by elements": ("codes.cuh", "at % 2 ?", "at % 2 == 0 ?"),
    "absmax by rows": (
        "codes.cuh",
        "const float scale = scale_of<kNested>(codes, at >> codes.log_block);",
        "const float scale = scale_of<kNested>(codes, row * (k >> codes.log_block) + "
        "(column >> codes.log_block));",
    ),
    "table shifted": ("codes.cuh", "__fmul_rn(code[4 * i], ", "__fmul_rn(code[4 * i + 1], "),
    "one plane in the other's place": ("codes.cuh", "0x7531", "0x6420"),
    "fourth bit of a code forgotten": ("codes.cuh", "(word >> 1 & 0x44444444)", "0"),
    "one scale for a piece": ("codes.cuh", "(chunk == 4 && two_scales)", "false"),
    "half a piece beyond the edge": ("codes.cuh", "first < k;", "column < k;"),
}


@needs_compiled_machine
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_fault_is_found(name, tmp_path, monkeypatch):
    """Rows of 1.1 steps in chunks, which begin in the middle of a block; and rows of odd length."""
    code = executor.load(mutated_ptx(tmp_path, KERNELS, MUTANTS[name], "sm_80"))
    monkeypatch.setattr(machine, "_code", lambda target: code)

    def suite():
        for n, k in ((9, 288), (7, 33)):
            weight, columns = drawn("nf4", n, k), torch.arange(0, k, 1 + k // 64)
            with using(machine.Machine()):
                found = columns_by_few_rows(weight, columns, BF16)
            assert torch.equal(bits(found), bits(decoded(weight, BF16, "cpu")[:, columns]))

    if name == "nothing":
        suite()
    else:
        with pytest.raises((AssertionError, RuntimeError)) as error:
            suite()
        assert "no kernel named" not in str(error.value)

"""The compiled CPU part: tails of every vector, few rows, threads, instruction sets, errors."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from lora_kernels.impl.cpu.support import MAX_RANK
from lora_kernels.native import absence
from lora_kernels.registration import operators
from lora_kernels.testing import Case, assert_parity, make_inputs, run
from tests.support.implementations import linear_call
from tests.support.layouts import laid_out, row_apart, transposed
from tests.support.paths import ROOT

ABSENT = absence("cpu")
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"compiled CPU part: {ABSENT}")

FP32, BF16 = torch.float32, torch.bfloat16
CPU = operators("lora_linear", "cpu")
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
# Below and above every vector's width, twice it, a mask's block, a chunk of expanded columns.
WIDTHS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 255, 257, 513)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
def test_tails_of_every_width(dtype, dropout_p):
    for index, width in enumerate(WIDTHS):
        n, r = WIDTHS[-1 - index], (1, 2, 5, 16, 17, 24, 33)[index % 7]
        case = Case((19 + index,), n, width, r, dtype, dropout_p=dropout_p)
        assert_parity(case, make_inputs(case), "cpu")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_numbers_of_rows(dtype):
    """Few rows take products of their own; blocks end at 128, tiles at 4 and 8."""
    for m in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 32, 33, 64, 65, 127, 128, 129, 257):
        case = Case((m,), 43, 75, 6, dtype, dropout_p=0.1)
        assert_parity(case, make_inputs(case), "cpu")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("apart", [False, True], ids=["", "apart"])
def test_weights_stored_by_columns(dtype, apart):
    """As transformers' Conv1D keeps them; both products take few rows and many."""
    layout = (lambda t: row_apart(t.mT).mT) if apart else transposed
    for m in (1, 3, 4, 5, 16, 17, 32, 33, 64, 65, 130):
        case = Case((m,), 43, 75, 6, dtype, dropout_p=0.1)
        assert_parity(case, laid_out(make_inputs(case), layout, ["weight"]), "cpu")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("m", [3, 300])
def test_weights_of_few_rows_and_columns(dtype, m):
    for n, k in ((1, 1), (7, 2), (8, 300), (9, 1), (300, 3)):
        case = Case((m,), n, k, 4, dtype, dropout_p=0.1)
        assert_parity(case, make_inputs(case), "cpu")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("m", [1, 16, 100, 700])
def test_bits_do_not_depend_on_the_number_of_threads(dtype, dropout_p, m):
    case = Case((m,), 384, 520, 24, dtype, dropout_p=dropout_p)
    inputs = make_inputs(case)
    results, products = [], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(run(case, inputs, "cpu"))
            products.append({"y": inputs.x @ inputs.weight.T, "dx": inputs.dy @ inputs.weight})
        finally:
            torch.set_num_threads(1)
    for name, alone in results[0].items():
        # MKL divides the sums of one row between threads, on Intel's processors.
        if name not in products[0] or torch.equal(products[0][name], products[1][name]):
            assert torch.equal(alone, results[1][name]), name


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("k", [40, 45, 600])
def test_mask_is_the_public_one(dtype, k):
    """xa of a unit matrix is D(x) itself, and so is dx of dy = 1, W = 0 with the same factors."""
    rank = min(k, 256)
    x, weight = torch.ones(37, k, dtype=dtype), torch.zeros(24, k, dtype=dtype)
    a, b = torch.eye(rank, k, dtype=dtype), torch.zeros(24, rank, dtype=dtype)
    seed, threshold = torch.tensor(-3), 20000
    keep = lk.dropout_mask(x.shape, threshold / 65536, seed)
    _, xa = CPU.forward(x, *linear_call(weight, a, b, None, seed, 1.0, threshold).flat())
    assert torch.equal(xa != 0, keep[:, :rank])
    a, b = torch.ones(1, k, dtype=dtype), torch.ones(24, 1, dtype=dtype)
    dy = torch.ones(37, 24, dtype=dtype)
    needs = [True, False, False, False]
    call = linear_call(weight, a, b, None, seed, 1.0, threshold)
    dx, *_ = CPU.backward(dy, None, None, *call.flat_backward(), needs)
    assert torch.equal(dx != 0, keep)


def test_infinity_does_not_leak_into_other_rows_or_padded_ranks():
    x = torch.randn(12, 64)
    x[5, 7] = float("inf")
    weight, a, b = torch.zeros(32, 64), torch.rand(3, 64) + 0.1, torch.rand(32, 3) + 0.1
    y, xa = CPU.forward(x, *linear_call(weight * 0, a, b).flat())
    others = torch.arange(12) != 5
    assert torch.isfinite(y[others]).all()
    assert (xa[5] == float("inf")).all()


def test_what_it_refuses():
    x, w = torch.randn(3, 8), torch.randn(6, 8)
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    with pytest.raises(ValueError, match="'cpu' can't serve this call: needs bfloat16 or float32"):
        lk.lora_linear(x.double(), w.double(), a, b, impl="cpu")
    rank = MAX_RANK + 1
    a, b = torch.randn(rank, 8), torch.randn(6, rank)
    with pytest.raises(ValueError, match=f"needs a rank of at most {MAX_RANK}, got {rank}"):
        lk.lora_linear(x, w, a, b, impl="cpu")
    assert lk.lora_linear(x, w, a, b).shape == (3, 6)


def test_auto_takes_it():
    x, w, a, b = (torch.randn(s) for s in ((3, 8), (6, 8), (2, 8), (6, 2)))
    assert lk.explain(x, w, a, b).choice == "cpu"


class Crossings(TorchDispatchMode):
    """Names of the package's operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_kernels":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_one_crossing_of_the_dispatcher_a_direction():
    case = Case((70,), 48, 40, 8, BF16, dropout_p=0.1)
    with Crossings() as seen:
        run(case, make_inputs(case), "cpu")
    assert seen.names == ["lora_linear_forward_cpu", "lora_linear_backward_cpu"]


def _isa(name):
    environment = os.environ | {"LORA_KERNELS_TEST_ISA": name}
    code = "import lora_kernels; from lora_kernels.native import absence; absence('cpu')\n"
    code += "import torch; print(torch.ops.lora_kernels.cpu_isa())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return environment, done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif("LORA_KERNELS_TEST_ISA" in os.environ, reason="is run by this test itself")
@pytest.mark.parametrize("isa", ISAS[1:])
def test_kernels_of_lesser_processors(isa):
    """Parity and masks again, some, in a process that takes the kernels of another instruction set.

    Which third it is changes from run to run.
    """
    environment, taken = _isa(isa)
    if taken != isa:
        assert isa != "portable"
        pytest.skip(f"this processor has no {isa}")
    if taken == torch.ops.lora_kernels.cpu_isa():
        pytest.skip("the other tests of this file take these kernels")
    tests = [f"tests/impl/cpu/test_{name}.py" for name in ("cpu", "dora", "quantised")]
    tests += ["tests/ops/test_parity.py", "tests/ops/test_dropout.py"]
    share = f"{int(os.environ['LORA_KERNELS_TEST_SEED']) % 3 + 1}/3"
    command = [sys.executable, "-m", "pytest", "-q", "--share", share]
    command += [*tests, "-k", "cpu or compiled"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]

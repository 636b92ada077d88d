"""DoRA of the compiled CPU part: tails, blocks, norms, threads, masks, what it refuses."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.impl.reference import dora as reference
from lora_kernels.native import absence
from lora_kernels.operands.call import Adapter, LinearCall
from lora_kernels.operands.dora import DoraCall
from lora_kernels.operands.dropout import Dropout
from lora_kernels.operands.weight import Dense
from lora_kernels.registration import operators
from lora_kernels.testing import DORA, DoraCase
from tests.impl.cpu.test_cpu import WIDTHS, Crossings
from tests.support.layouts import laid_out, row_apart, transposed

ABSENT = absence("cpu")
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"compiled CPU part: {ABSENT}")

FP32, BF16 = torch.float32, torch.bfloat16
CPU = operators("lora_dora_linear", "cpu")


def check(case, change=lambda inputs: inputs):
    DORA.assert_parity(case, change(DORA.inputs(case)), "cpu")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
def test_tails_of_every_width(dtype, dropout_p):
    for index, width in enumerate(WIDTHS[3::2]):
        n, r = WIDTHS[-2 - 2 * index], (1, 2, 5, 16, 17, 24, 33)[index % 7]
        adapters = FP32 if index % 3 == 0 else None
        check(DoraCase((19 + index,), n, width, r, dtype, adapters, dropout_p))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_numbers_of_rows(dtype):
    """Groups end at 32; sums of dy u are made of chains of 16, and of 16 of those."""
    for m in (1, 5, 16, 33, 64, 257):
        check(DoraCase((m,), 43, 75, 6, dtype, dropout_p=0.1 if m % 2 else 0.0))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("apart", [False, True], ids=["", "apart"])
def test_weights_stored_by_columns(dtype, apart):
    layout = (lambda t: row_apart(t.mT).mT) if apart else transposed
    for m in (3, 65):
        case = DoraCase((m,), 43, 75, 6, dtype, dropout_p=0.1)
        check(case, lambda inputs: laid_out(inputs, layout, ["weight"]))


@pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("wanted", [("dx",), ("da",), ("db",), ("dbias",), ("dm",), ("db", "dm")])
def test_only_the_gradients_asked_for(wanted, p):
    case = DoraCase((70,), 72, 136, 8, BF16, dropout_p=p)
    inputs = DORA.inputs(case)
    actual = DORA.call(case, inputs, "cpu", wanted)
    assert actual.keys() == {"y", *wanted}
    DORA.assert_results(case, inputs, actual, "cpu")


@pytest.mark.parametrize("left", [1.0, 0.1, 1e-2, 1e-4])
@pytest.mark.parametrize("adapters", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_norms_of_rows_that_all_but_cancel(dtype, adapters, left):
    """Of rows of which all but a part `left` cancels, beside rows that don't."""
    n, k = 130, 1037
    a, b = torch.randn(17, k).to(adapters), torch.randn(n, 17).to(adapters)
    update = 1.7 * (b.double() @ a.double())
    weight = (left * update.roll(1, 0) - update).to(dtype)
    weight[:70] = torch.randn(70, k).to(dtype)
    exact = (weight.double() + update).norm(dim=1)
    x, magnitude = torch.randn(2, k).to(dtype), torch.ones(n)
    call = DoraCall(LinearCall(Dense(weight), Adapter(a, b, 1.7), None, None), magnitude)
    norm = CPU.forward(x, *call.flat())[3]
    assert norm.dtype == FP32
    limit = 1e-5 + 4 * torch.finfo(FP32).eps * (update.norm(dim=1) / exact)
    error = (norm.double() - exact).abs() / exact
    assert (error < limit).all(), error.max()


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype, dropout_p):
    """But for products with W, which the library divides as it likes."""
    case = DoraCase((300,), 384, 520, 24, dtype, dropout_p=dropout_p)
    inputs, results = DORA.inputs(case), []
    inputs.weight.fill_(1.0).mul_(torch.randint(-1, 2, inputs.weight.shape))
    inputs.x, inputs.dy = (t.mul(8).round() for t in (inputs.x, inputs.dy))
    inputs.magnitude = DORA.inputs(case).magnitude
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(DORA.call(case, inputs, "cpu"))
        finally:
            torch.set_num_threads(1)
    for name in ("y", "da", "db", "dbias", "dm"):
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("m", [37, 9000])
def test_the_mask_is_the_public_one_in_both_products(dtype, m):
    """u of W = 1 and g = 2 is the row's sum of D(x); more rows than are dropped at a time."""
    k, threshold = 130, 20000
    x, weight = torch.ones(m, k, dtype=dtype), torch.ones(8, k, dtype=dtype)
    a, b = torch.zeros(1, k, dtype=dtype), torch.zeros(8, 1, dtype=dtype)
    seed = torch.tensor(-3)
    call = LinearCall(Dense(weight), Adapter(a, b, 1.0), None, Dropout(seed, threshold))
    magnitude = 2 * reference.row_norms(call)
    keep = lk.dropout_mask(x.shape, threshold / 65536, seed)
    factor = 65536 / (65536 - threshold)
    _, xa, u, norm = CPU.forward(x, *DoraCall(call, magnitude).flat())
    expected = keep.sum(1, dtype=torch.float64) * factor
    tolerance = 2**-7 if dtype == BF16 else 1e-6
    torch.testing.assert_close(u[:, 0].double(), expected, rtol=tolerance, atol=0)
    dy, asked = torch.ones(m, 8, dtype=dtype), [True, False, False, False, False]
    kept = None, xa, u, norm
    dx = CPU.backward(dy, *kept, magnitude, *call.flat_backward(), asked)[0]
    torch.testing.assert_close(dx.double(), 8 + 8 * factor * keep.double(), rtol=tolerance, atol=0)


def test_infinity_does_not_leak_into_other_rows_or_columns():
    x = torch.randn(40, 64)
    x[5, 7] = float("inf")
    weight, a, b = torch.rand(32, 64) + 0.1, torch.rand(3, 64) + 0.1, torch.rand(32, 3) + 0.1
    magnitude = torch.ones(32)
    magnitude[3] = float("nan")
    call = DoraCall(LinearCall(Dense(weight), Adapter(a, b, 1.0), None, None), magnitude)
    y, xa, u, _ = CPU.forward(x, *call.flat())
    row, column = torch.arange(40) == 5, torch.arange(32) == 3
    assert (y.isfinite() == ~(row[:, None] | column)).all()
    assert (u.isfinite().all(1) == ~row).all()
    assert (xa[5] == float("inf")).all()


def test_one_crossing_of_the_dispatcher_a_direction():
    case = DoraCase((70,), 48, 40, 8, BF16, dropout_p=0.1)
    with Crossings() as seen:
        DORA.call(case, DORA.inputs(case), "cpu")
    assert seen.names == ["lora_dora_linear_forward_cpu", "lora_dora_linear_backward_cpu"]


def test_auto_takes_it_and_saves_x_u_and_little_more():
    x, magnitude = torch.randn(512, 256, requires_grad=True), torch.rand(256) + 0.5
    w, a, b = (torch.randn(s, requires_grad=s[0] != s[1]) for s in ((256, 256), (8, 256), (256, 8)))
    call = x, w, a, b, magnitude.requires_grad_()
    assert lk.explain(lk.lora_dora_linear, *call).choice == "cpu"
    saved, parameters = {}, {t.untyped_storage().data_ptr() for t in call[1:]}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        lk.lora_dora_linear(*call, dropout_p=0.1, training=True)
    kept = sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in parameters)
    assert kept <= 2.1 * x.nbytes


def _arguments():
    """Return forward's and backward's arguments by name, in the schemas' order."""
    x, weight, a, b = (torch.randn(s) for s in ((5, 8), (6, 8), (2, 8), (6, 2)))
    forward = {
        "x": x, "magnitude": torch.ones(6), "weight": weight, "parts": None, "format": None,
        "lora_A": a, "lora_B": b, "bias": torch.randn(6), "seed": None, "threshold": 0,
        "scaling_tensor": None, "scaling": 1.0,
    }  # fmt: skip
    y, xa, u, norm = CPU.forward(*forward.values())
    shared = {name: t for name, t in forward.items() if name not in ("x", "bias")}
    kept = {"dy": y, "x": x, "xa": xa, "u": u, "norm": norm}
    return forward, {**kept, **shared, "wanted": [True] * 5}


BAD = {
    "x": [(5, 7)], "magnitude": [(5,), (6, 1), (7,)], "lora_A": [(2, 7)], "lora_B": [(5, 2)],
    "bias": [(5,)], "dy": [(5, 7)], "xa": [(4, 2), (5, 3)], "u": [(4, 6), (5, 7), (30,)],
    "norm": [(5,), (6, 1)],
}  # fmt: skip


@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("how", ["sizes", "emptied", "halved", "dtype"])
def test_what_python_did_not_see_is_refused_by_name(direction, how):
    """The operators' own checks: a parameter may have been resized since."""
    operator = CPU[direction]
    for name, shapes in BAD.items():
        given = _arguments()[direction]
        if name not in given or (how == "dtype" and name == next(iter(given))):
            continue  # W then isn't of the dtype
        if how == "dtype":
            others, expected = [given[name].long()], "expected"
        elif how == "sizes":
            others, expected = [torch.zeros(shape) for shape in shapes], "expected shape"
        else:
            others, expected = [given[name].clone()], "expected memory for shape"
            storage = others[0].untyped_storage()
            storage.resize_(0 if how == "emptied" else storage.nbytes() // 2)
        for other in others:
            with pytest.raises(RuntimeError, match=f"{name}: {expected}"):
                operator(*(given | {name: other}).values())


def test_what_backward_lacks_and_what_it_does_not_serve_is_named():
    forward, backward = _arguments()
    for name, of in (("x", "lora_A"), ("xa", "lora_B"), ("u", "magnitude")):
        with pytest.raises(RuntimeError, match=f"{name}: expected a tensor, which {of}'s gradient"):
            CPU.backward(*(backward | {name: None}).values())
    with pytest.raises(RuntimeError, match="wanted: expected five, got 4"):
        CPU.backward(*(backward | {"wanted": [True] * 4}).values())
    with pytest.raises(RuntimeError, match="format: expected dense, got nf4"):
        CPU.forward(*(forward | {"format": "nf4:64:6:8"}).values())
    doubles = {
        name: t.double() if isinstance(t, torch.Tensor) else t for name, t in forward.items()
    }
    with pytest.raises(RuntimeError, match="x: expected float32 or bfloat16"):
        CPU.forward(*doubles.values())
    half = (forward[name].half() for name in ("x", "weight"))
    others = forward["lora_A"], forward["lora_B"], forward["magnitude"]
    with pytest.raises(ValueError, match=r"needs bfloat16 or float32, got torch\.float16"):
        lk.lora_dora_linear(*half, *others, impl="cpu")

"""`lora_dora_linear`: the definition as PEFT has it, parity of implementations, derivatives."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.impl.eager import dora as eager
from lora_kernels.impl.reference import dora as reference
from lora_kernels.impl.reference import linear
from lora_kernels.operands.call import Adapter, LinearCall
from lora_kernels.operands.weight import Dense
from lora_kernels.registration import operators
from lora_kernels.testing import DORA, DoraCase
from lora_kernels.testing.dora import dora_call
from tests.support.implementations import skip_if_refused
from tests.support.layouts import LAYOUTS, laid_out

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
IMPLS = ("eager", "reference")
SCALING = 1.5


class Dropped(nn.Dropout):
    """Dropout with the mask of a seed."""

    def forward(self, x):
        keep = lk.dropout_mask(x.shape, self.p, seed=7)
        return x * keep * (65536 / (65536 - round(65536 * self.p))) if self.training else x


def layer(n=9, k=13, r=4, p=0.0, dtype=FP64):
    """Return PEFT's layer in training, and x; B isn't zero, one magnitude is, one is negative."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=r, lora_alpha=SCALING * r, use_dora=True, target_modules=["0"], init_lora_weights=False
    )
    model = peft.get_peft_model(nn.Sequential(nn.Linear(k, n, dtype=dtype)), config)
    found = model.base_model.model[0].train()
    if p:
        found.lora_dropout["default"] = Dropped(p)
    magnitude = found.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        magnitude.mul_(0.5 + torch.rand(n))
        magnitude[0], magnitude[1] = 0.0, -magnitude[1]
    found.base_layer.bias.requires_grad_()
    return found, torch.randn(2, 3, k, dtype=dtype, requires_grad=True)


def tensors_of(peft_layer):
    """Return A, B, magnitude and bias of PEFT's layer."""
    return (
        peft_layer.lora_A["default"].weight,
        peft_layer.lora_B["default"].weight,
        peft_layer.lora_magnitude_vector["default"].weight,
        peft_layer.base_layer.bias,
    )


def ours(peft_layer, p=0.0, impl="auto"):
    """Return the function of x, A, B, magnitude and bias that PEFT's layer is."""
    weight = peft_layer.base_layer.weight
    settings = {"scaling": SCALING, "dropout_p": p, "training": True, "seed": 7, "impl": impl}
    return lambda x, *tensors: lk.lora_dora_linear(x, weight, *tensors, **settings)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients_are_pefts(impl, p):
    for r in (1, 4, 64, 256):
        found, x = layer(r=r, p=p)
        tensors = (x, *tensors_of(found))
        expected = found(x)
        y = ours(found, p, impl)(*tensors)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        dy = torch.randn_like(y)
        theirs = torch.autograd.grad(expected, tensors, dy)
        for one, other in zip(torch.autograd.grad(y, tensors, dy), theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck_with_the_norm_frozen(impl, p, monkeypatch):
    found, x = layer(p=p)
    tensors = (x, *tensors_of(found))
    for module in (reference, eager):
        norm = reference.row_norms(_linear_call(found))
        monkeypatch.setattr(module, "row_norms", lambda call, norm=norm: norm)
    f = ours(found, p, impl)
    assert gradcheck(f, tensors)
    assert gradgradcheck(f, tensors)


def _linear_call(found):
    a, b, _, bias = tensors_of(found)
    return LinearCall(Dense(found.base_layer.weight), Adapter(a, b, SCALING), bias, None)


@pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("larger", ["A", "B", "both", "gain"])
def test_what_g_brings_into_the_range_of_float16(larger, impl, p):
    """Beside float32 adapters; A x, B or u beyond 65,504 were infinite, g dy below 6e-8 zero."""
    case = DoraCase((3, 20), 24, 33, 4, FP16, FP32, dropout_p=p)
    inputs = DORA.inputs(case)
    if larger in ("A", "both"):
        inputs.lora_A.mul_(3e5)
    if larger in ("B", "both"):
        inputs.lora_B.mul_(3e5)
    if larger == "gain":
        inputs.weight.mul_(1e-4)
        inputs.lora_B.mul_(1e-5)
    oracle = DORA.oracle(case, inputs, FP64)
    for name, found in DORA.call(case, inputs, impl).items():
        tolerance = 1e-2 * oracle[name].abs().max().item()
        torch.testing.assert_close(found.double(), oracle[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", ["cpu", "eager"])
def test_strided_tensors(impl, layout, p):
    skip_if_refused(impl, BF16, op=DORA.op)
    case = DoraCase((4, 33), 72, 129, 5, BF16, dropout_p=p)
    inputs = DORA.inputs(case)
    for name in ("bias", "magnitude"):
        t = getattr(inputs, name)
        setattr(inputs, name, torch.stack([t, t + 1], -1)[..., 0])
    DORA.assert_parity(case, laid_out(inputs, layout), impl)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("impl", ["cpu", *IMPLS])
def test_leading_dimensions_and_empty_batches(impl, leading):
    skip_if_refused(impl, op=DORA.op)
    case = DoraCase(leading, 40, 24, 5, dropout_p=0.3)
    found = DORA.call(case, DORA.inputs(case), impl)
    assert found["y"].shape == (*leading, 40)
    assert all(torch.isfinite(t).all() for t in found.values())
    if 0 in leading:
        assert not any(found[name].any() for name in ("da", "db", "dm", "dbias"))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("impl", ["cpu", "eager"])
def test_an_adapter_at_its_start_is_the_base_layer_to_the_bit(impl, p, with_bias):
    skip_if_refused(impl, op=DORA.op)
    # From K = 256 on a bias that is added to the product has other bits.
    case = DoraCase((64,), 256, 640, 5, FP32, dropout_p=p, bias=with_bias)
    inputs = DORA.inputs(case)
    inputs.lora_B.zero_()
    inputs.magnitude = inputs.weight.norm(dim=1)
    found = DORA.call(case, inputs, impl)
    assert torch.equal(found["y"], torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias))
    DORA.assert_results(case, inputs, found, impl)


@pytest.mark.parametrize("left", [1.0, 0.3, 0.1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_the_norm_of_rows_that_cancel(dtype, left):
    """W = -s B A but for a part `left` of it: the factored sum alone is off by 4e-3 at 1e-2."""
    a, b = torch.randn(16, 512).to(dtype), torch.randn(256, 16).to(dtype)
    update = 1.7 * (b.double() @ a.double())
    weight = (left * update.roll(1, 0) - update).to(dtype)
    weight[:128] = torch.randn(128, 512).to(dtype)  # beside rows that don't
    call = LinearCall(Dense(weight), Adapter(a, b, 1.7), None, None)
    exact = (weight.double() + update).norm(dim=1)
    limit = 1e-5 + 4 * torch.finfo(FP32).eps * (update.norm(dim=1) / exact)
    for module in (eager, reference):
        error = (module.row_norms(call).double() - exact).abs() / exact
        assert (error < limit).all(), (error.max(), module)


def test_the_guard_is_what_keeps_the_norm_right(monkeypatch):
    monkeypatch.setattr(eager, "CANCELLED", 0.0)
    with pytest.raises(AssertionError):
        test_the_norm_of_rows_that_cancel(FP32, 1e-3)


def norm_not_detached(peft_layer, p):
    weight = peft_layer.base_layer.weight

    def call(x, a, b, m, bias):
        norm = (weight + SCALING * b @ a).norm(dim=1)
        keep = lk.dropout_mask(x.shape, p, 7).double() / (1 - round(65536 * p) / 65536) if p else 1
        low = SCALING * (x * keep) @ a.T @ b.T
        return x @ weight.T + low + bias + (m / norm - 1) * ((x * keep) @ weight.T + low)

    return call


FORWARD, BACKWARD = eager.forward, eager.backward


def gain_on_the_bias(x, call):
    y, xa, u, norm = FORWARD(x, call)
    return (y + (call.gain(norm) - 1) * call.linear.bias).to(y.dtype), xa, u, norm


def dropped_once(x, call):
    """The base weight's input isn't dropped, as torchtune and Axolotl have it."""
    plain = call.linear._replace(dropout=None, bias=None)
    y, xa, u, norm = FORWARD(x, call)
    zero = plain._replace(adapter=plain.adapter._replace(scaling=0.0))
    base = linear.forward(x, zero)[0]
    low = (xa @ call.linear.adapter.b.T) * call.linear.adapter.scaling
    u = (base.reshape(u.shape) + low).to(u.dtype)
    y = (call.gain(norm) * u + call.linear.bias).to(y.dtype).reshape(y.shape)
    return y, xa, u, norm


def dm_from_y_with_bias(dy, kept, call, wanted):
    other = kept._replace(u=kept.u + call.linear.adapter.scaling)
    return BACKWARD(dy, other, call, wanted)


def gain_forgotten_in_backward(dy, kept, call, wanted):
    return BACKWARD(dy, kept, call._replace(magnitude=kept.norm), wanted)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("forward", gain_on_the_bias),
        ("forward", dropped_once),
        ("backward", dm_from_y_with_bias),
        ("backward", gain_forgotten_in_backward),
    ],
)
def test_mutants_are_caught(name, mutant, dtype, monkeypatch):
    case = DoraCase((65,), 48, 40, 8, dtype, dropout_p=0.2)
    monkeypatch.setattr(eager, name, mutant)
    with pytest.raises(AssertionError, match=r"budget|NaN"):
        DORA.assert_parity(case, DORA.inputs(case), "eager")


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_norm_with_a_gradient_is_caught(p):
    found, x = layer(p=p)
    tensors = (x, *tensors_of(found))
    y, other = ours(found, p)(*tensors), norm_not_detached(found, p)(*tensors)
    torch.testing.assert_close(y, other)
    da, wrong = (torch.autograd.grad(t.square().sum(), tensors[1])[0] for t in (y, other))
    assert (da - wrong).abs().max() > 1e-3 * da.abs().max()


def _penalty(f, *args):
    dx = torch.autograd.grad(f(*args).tanh().sum(), args[0], create_graph=True)[0]
    return torch.autograd.grad(dx.square().sum(), args)


DERIVATIVES = {
    "grad": lambda f, *args: grad(lambda *t: f(*t).square().sum(), (0, 1, 2, 3))(*args),
    "jvp": lambda f, *args: jvp(f, args, tuple(torch.ones_like(t) for t in args))[1],
    "vmap": lambda f, x, *args: vmap(f, (0, *[None] * len(args)))(x, *args),
    "forward over reverse": lambda f, *args: jvp(
        grad(lambda *t: f(*t).square().sum(), (0, 1, 2)), args, args
    )[1],
    "penalty": _penalty,
    "checkpoint": lambda f, *args: torch.autograd.grad(
        checkpoint(f, *args, use_reentrant=False).square().sum(), args
    ),
}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_are_those_of_the_definition(name, p):
    found, x = layer(p=p)
    weight = found.base_layer.weight

    def definition(x, a, b, m, bias):
        norm = (weight + SCALING * b @ a).norm(dim=1).detach()
        shape = (3, 13) if name == "vmap" else x.shape  # a mask belongs to a row's number
        keep = lk.dropout_mask(shape, p, 7).double() / (1 - round(65536 * p) / 65536) if p else 1
        u = (x * keep) @ weight.T + SCALING * (x * keep) @ a.T @ b.T
        return x @ weight.T + SCALING * (x * keep) @ a.T @ b.T + bias + (m / norm - 1) * u

    args = (x, *tensors_of(found))
    expected = DERIVATIVES[name](definition, *args)
    torch.testing.assert_close(DERIVATIVES[name](ours(found, p), *args), expected)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiled_and_exported_calls(p):
    torch._dynamo.reset()
    found, x = layer(p=p, dtype=FP32)
    args = (x, *tensors_of(found))
    f = ours(found, p)
    expected = torch.autograd.grad(f(*args).square().sum(), args)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*args).square().sum(), args), expected)

    class Model(nn.Module):
        def forward(self, *args):
            return f(*args)

    program = torch.export.export(Model(), tuple(t.detach() for t in args))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("lora_kernels.lora_dora_linear.default") == 1
    y = program.module()(*args)
    torch.testing.assert_close(y, f(*args))
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), args), expected)
    # Torch leaves detach out where it decomposes: such a graph is for inference, as PEFT's is.
    torch.testing.assert_close(program.run_decompositions().module()(*args), f(*args))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_joint_graph_can_be_differentiated_again(p):
    from torch.fx.experimental.proxy_tensor import make_fx

    found, x = layer(p=p)
    args = (x, *tensors_of(found))

    def step(*args):
        y = ours(found, p)(*args)
        return torch.autograd.grad(y.square().sum(), args, create_graph=True)

    graph = make_fx(step)(*args)

    def second(f):
        return torch.autograd.grad(sum(g.square().sum() for g in f(*args)), args)

    torch.testing.assert_close(second(graph), second(step))


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(p):
    case = DoraCase((5,), 9, 13, 4, dropout_p=p)
    inputs = DORA.inputs(case)
    inputs.magnitude.requires_grad_()
    args = (inputs.x.requires_grad_(), *dora_call(case, inputs).flat())
    for impl in ["cpu", *IMPLS]:
        skip_if_refused(impl, op=DORA.op)
        torch.library.opcheck(operators("lora_dora_linear", impl).forward, args)


def test_autocast_casts_all_but_the_adapter():
    found, x = layer(dtype=FP32)
    f, args = ours(found), (x, *tensors_of(found))
    with torch.autocast("cpu", BF16):
        y = f(*args)
    assert y.dtype == BF16
    limit = 0.03 * y.abs().max().item()
    torch.testing.assert_close(y.float(), f(*args), rtol=0, atol=limit)
    assert all(g.dtype == FP32 for g in torch.autograd.grad(y.float().square().sum(), args))


def test_an_unfrozen_base_weight_takes_the_norm_as_a_constant():
    found, x = layer(p=0.3)
    found.base_layer.weight.requires_grad_()
    args = (x, *tensors_of(found))
    weight = found.base_layer.weight
    y, expected = ours(found, 0.3)(*args), found(x)
    one, other = (torch.autograd.grad(t.square().sum(), weight)[0] for t in (y, expected))
    torch.testing.assert_close(one, other)


def test_a_row_without_length_has_no_finite_gain():
    """As in PEFT: magnitude / 0."""
    x, weight, a, b = torch.ones(1, 2), torch.eye(2), torch.ones(1, 2), torch.zeros(2, 1)
    weight[0] = 0
    for impl in ("auto", *IMPLS):
        y = lk.lora_dora_linear(x, weight, a, b, torch.ones(2), impl=impl)
        assert y[0, 0].isnan()
        assert y[0, 1] == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"magnitude": torch.ones(3)}, ValueError, r"magnitude: expected shape \[4\], got \[3\]"),
        ({"magnitude": torch.ones(4, 1)}, ValueError, r"magnitude: expected shape \[4\]"),
        ({"magnitude": torch.ones(4).int()}, TypeError, "magnitude: expected float16, bfloat16"),
        ({"magnitude": None}, TypeError, "magnitude: expected a torch.Tensor, got NoneType"),
        ({"magnitude": torch.ones(4, device="meta")}, ValueError, "magnitude: expected the device"),
        ({"lora_B": torch.ones(4, 3)}, ValueError, r"lora_B: expected shape \[4, 2\]"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a probability"),
        ({"scaling": float("nan")}, ValueError, "scaling: expected a finite number"),
        ({"impl": "fast"}, ValueError, "impl: expected one of"),
        ({"impl": "triton"}, ValueError, "'triton' can't serve this call: needs a CUDA device"),
        ({"impl": "cuda"}, ValueError, "'cuda' can't serve this call: has no lora_dora_linear"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    given = {
        "x": torch.ones(2, 5), "weight": torch.ones(4, 5), "lora_A": torch.ones(2, 5),
        "lora_B": torch.ones(4, 2), "magnitude": torch.ones(4),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        lk.lora_dora_linear(**(given | change))

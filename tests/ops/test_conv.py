"""lora_conv1d, 2d, 3d: against float64 and PEFT, gradients, what is saved, captures, bad input."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp
from torch.nn import functional

import lora_kernels as lk
from lora_kernels.impl.eager import conv as eager
from lora_kernels.impl.reference import conv as reference
from lora_kernels.operands.call import Adapter, LinearCall, Wanted
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.weight import Dense
from lora_kernels.ops import conv
from lora_kernels.registration import operators
from lora_kernels.testing import assert_within_budget
from tests.support.draws import errors_of_draws

IMPLS = ("eager", "reference")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMES = ("y", "dx", "da", "db", "dbias")
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
SEED, SCALING = 5, 1.7


def problem(
    spatial, kernel, c=8, out=12, r=4, groups=1, dtype=F64, adapter_dtype=None, last=False, n=2
):
    """Return x, W, A, B and bias; all but W require grad. last: x's channels are last in memory."""
    dims, adapter = len(spatial), adapter_dtype or dtype
    size = kernel**dims * c
    x = torch.randn(n, *spatial, c).movedim(-1, 1).to(dtype)
    x = x if last else x.contiguous()
    weight = (torch.randn(out, c // groups, *[kernel] * dims) * size**-0.5).to(dtype)
    a = (torch.randn(r, c, *[kernel] * dims) * size**-0.5).to(adapter)
    b = (torch.randn(out, r // groups, *[1] * dims) * r**-0.5).to(adapter)
    x, a, b, bias = (t.requires_grad_() for t in (x, a, b, torch.randn(out).to(dtype)))
    return x, weight, a, b, bias


def function(x):
    return {3: lk.lora_conv1d, 4: lk.lora_conv2d, 5: lk.lora_conv3d}[x.ndim]


def ours(case, impl="auto", dropout_p=0.0, **how):
    x, weight, a, b, bias = case
    how = {"scaling": SCALING, "dropout_p": dropout_p, "training": True, "seed": SEED, **how}
    return function(x)(x, weight, a, b, bias, impl=impl, **how)


def plain(case, dropout_p=0.0, stride=1, padding=0, groups=1, scaling=SCALING):
    """PEFT's formula, with dropout's mask given."""
    x, weight, a, b, bias = case
    convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[x.ndim]
    dropped = x
    if dropout_p:
        mask = lk.dropout_mask((x.shape[0], *x.shape[2:], x.shape[1]), dropout_p, SEED)
        dropped = x * mask.movedim(-1, 1) * (65536 / (65536 - round(65536 * dropout_p)))
    y = convolve(x, weight, bias, stride, padding, 1, groups)
    xa = convolve(dropped, a, None, stride, padding)
    return y + scaling * convolve(xa, b, groups=groups)


def results(y, case, dy):
    x, _, a, b, bias = case
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, (x, a, b, bias), dy)), strict=True))


def by_reference(case, dy, dtype, dropout_p=0.0, **how):
    x, weight, a, b, bias = (t.detach().to(dtype) for t in case)
    geometry = conv.geometry_of(
        x.ndim - 2, how.get("stride", 1), how.get("padding", 0), how.get("groups", 1), ()
    )
    dropout = drawn(dropout_p, SEED, x.device)
    call = LinearCall(Dense(weight), Adapter(a, b, how.get("scaling", SCALING)), bias, dropout)
    y, xa = reference.forward(x, call, geometry)
    inputs = (x, xa, list(x.shape))
    grads = reference.backward(dy.to(dtype), inputs, call, geometry, Wanted(*[True] * 4))
    return dict(zip(NAMES, (y, *grads), strict=True))


def assert_parity(case, impl, dropout_p=0.0, **how):
    x, _, a, b, bias = case
    given = (*case, dy := torch.randn_like(y := ours(case, impl, dropout_p, **how)))

    def of(dtype):
        return lambda draw: by_reference(draw[:-1], draw[-1], dtype, dropout_p, **how)

    expected, between = of(F64)(given), y.numel() // y.shape[1] * a.shape[0]
    errors = errors_of_draws(given, between, of(x.dtype), of(F64))
    for (name, result), owner in zip(results(y, case, dy).items(), (x, x, a, b, bias), strict=True):
        assert result.dtype == owner.dtype
        assert_within_budget(result, expected[name], errors[name], f"{name} of {impl}")


GEOMETRIES = {
    "3x3": ((7, 6), 3, {"padding": 1}),
    "3x3, channels last": ((7, 6), 3, {"padding": 1, "last": True}),
    "stride": ((9, 8), 3, {"stride": 2, "padding": (0, 1)}),
    "stride 1 by 2, channels last": ((9, 8), 2, {"stride": (1, 2), "last": True}),
    "grouped": ((5, 5), 3, {"groups": 2, "padding": 1}),
    "depthwise": ((5, 5), 3, {"groups": 4, "c": 4, "out": 8, "last": True}),
    "1x1": ((5, 3), 1, {}),
    "1x1, channels last": ((5, 3), 1, {"last": True}),
    "1x1, stride, channels last": ((5, 3), 1, {"stride": 2, "last": True}),
    "1x1, padded": ((5, 3), 1, {"padding": 1, "last": True}),
    "1-d": ((11,), 3, {"padding": "same"}),
    "1-d, kernel 1, channels last": ((11,), 1, {"last": True, "c": 5}),
    "3-d": ((4, 5, 3), 2, {"stride": (2, 1, 1)}),
    "3-d, channels last": ((4, 5, 3), 3, {"padding": "same", "last": True, "c": 3}),
}
_MAKING = ("last", "c", "out", "groups")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("spatial", "kernel", "how"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_it_computes_pefts_formula(spatial, kernel, how, dropout_p, impl):
    case = problem(spatial, kernel, **{k: v for k, v in how.items() if k in _MAKING})
    how = {k: v for k, v in how.items() if k not in ("last", "c", "out")}
    y, expected = ours(case, impl, dropout_p, **how), plain(case, dropout_p, **how)
    dy = torch.randn_like(y)
    found, theirs = results(y, case, dy), results(expected, case, dy)
    torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("r", [1, 8, 64])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(F32, None), (BF16, None), (BF16, F32), (F16, F32)], ids=str
)
def test_parity(dtype, adapter_dtype, r, impl):
    how = {"dtype": dtype, "adapter_dtype": adapter_dtype, "r": r, "c": 19, "out": 23}
    assert_parity(problem((9, 7), 3, **how), impl, 0.1, padding=1)
    assert_parity(problem((9, 7), 3, last=True, **how), impl, 0.1, stride=2)
    assert_parity(problem((9, 7), 1, **how), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck(groups, impl):
    x, weight, a, b, bias = problem((4, 3), 2, c=2, out=2, r=2, groups=groups, n=1)

    def f(*case):
        return ours(case, impl, 0.3, padding=1, groups=groups)

    leaves = (x, weight.requires_grad_(), a, b, bias)
    assert gradcheck(f, leaves)
    if groups == 1:
        assert gradgradcheck(f, leaves)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_peft_computes_the_same(dims):
    peft = pytest.importorskip("peft")
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    base = kind(4, 6, 3, stride=2, padding=1, dtype=F64)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).double()
    layer = model.base_model.model[0]
    x = torch.randn(2, 4, *(5, 6, 7)[:dims], dtype=F64, requires_grad=True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    case = (x, base.weight, a, b, base.bias.requires_grad_())
    y, theirs = ours(case, scaling=1.5, stride=2, padding=1), model(x)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        results(y, case, dy), results(theirs, case, dy), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("kernel", [1, 3])
def test_dropout_does_not_depend_on_the_memory_format(kernel):
    case = problem((6, 5), kernel, c=13)
    x, _, *others = case
    last = (x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(), *case[1:])
    both = [ours(c, "eager", 0.5) for c in (case, last)]
    dy = torch.randn_like(both[0])
    torch.testing.assert_close(
        *[results(y, c, dy) for y, c in zip(both, (case, last), strict=True)]
    )
    assert both[1].is_contiguous(memory_format=torch.channels_last)
    assert len(others) == 3


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
def test_saved_is_x_and_a_little(dropout_p, kernel, last):
    case = problem((16, 16), kernel, 320, 320, 16, dtype=BF16, last=last)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(case, "eager", dropout_p, padding=kernel // 2)
    weights = {t.untyped_storage().data_ptr() for t in case[1:]}
    own = {t.untyped_storage().data_ptr(): t.nbytes for t in kept}
    saved = sum(size for at, size in own.items() if at not in weights)
    assert saved <= 1.05 * case[0].nbytes + 8  # the seed


def test_a_convolution_of_kernel_1_with_channels_last_runs_by_the_linear_kernels(monkeypatch):
    called = []
    run = conv.run_linear
    monkeypatch.setattr(conv, "run_linear", lambda x, *args: called.append(x) or run(x, *args))
    case = problem((4, 4), 1, dtype=F32, last=True)
    ours(case)
    assert called[0].data_ptr() == case[0].data_ptr()
    assert called[0].is_contiguous()
    ours(problem((4, 4), 1, dtype=F32))
    ours(case, stride=2)
    ours(case, padding=1)
    assert len(called) == 1


def test_an_unbatched_input():
    x, *others = problem((5, 4), 3, n=1)
    y = function(x)(x[0], *others, scaling=SCALING, padding=1)
    torch.testing.assert_close(y, plain((x, *others), padding=1)[0])


def test_a_tensor_of_scaling():
    case = problem((5, 4), 3)
    for scaling in (torch.tensor(0.3), torch.tensor(0.3, dtype=F64)):
        y, expected = ours(case, "eager", scaling=scaling), plain(case, scaling=scaling)
        dy = torch.randn_like(y)
        torch.testing.assert_close(results(y, case, dy), results(expected, case, dy))


def test_two_runs_give_the_same_bits():
    case = problem((12, 12), 3, dtype=BF16, adapter_dtype=F32)
    dy = torch.randn(2, 12, 12, 12).bfloat16()
    one, other = (results(ours(case, "eager", 0.2, padding=1), case, dy) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in NAMES)


FORWARD, BACKWARD = eager.forward, eager.backward


def unscaled(x, call, geometry):
    return FORWARD(x, call._replace(adapter=call.adapter._replace(scaling=1.0)), geometry)


def without_mask(x, call, geometry):
    return FORWARD(x, call._replace(dropout=None), geometry)


def mask_of_channels_first(x, call, geometry):
    keep = eager.kept(torch.ones_like(x).movedim(1, -1), call.dropout).movedim(-1, 1)
    y, _ = FORWARD(x, call._replace(dropout=None), geometry)
    low = FORWARD(x * keep, call._replace(dropout=None, bias=None), geometry)
    return y, low[1] * call.dropout.scale


def another_mask(dy, inputs, call, geometry, wanted):
    dropout = call.dropout._replace(seed=call.dropout.seed + 1)
    return BACKWARD(dy, inputs, call._replace(dropout=dropout), geometry, wanted)


def mask_forgotten(dy, inputs, call, geometry, wanted):
    return BACKWARD(dy, inputs, call._replace(dropout=None), geometry, wanted)


def branch_of_dx_forgotten(dy, inputs, call, geometry, wanted):
    alone = call._replace(adapter=call.adapter._replace(scaling=0.0))
    dx = BACKWARD(dy, inputs, alone, geometry, wanted).dx
    return BACKWARD(dy, inputs, call, geometry, wanted)._replace(dx=dx)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("forward", unscaled),
        ("forward", without_mask),
        ("forward", mask_of_channels_first),
        ("backward", another_mask),
        ("backward", mask_forgotten),
        ("backward", branch_of_dx_forgotten),
    ],
)
def test_mutants_are_caught(name, mutant, monkeypatch):
    case = problem((7, 7), 3, dtype=F32)
    assert_parity(case, "eager", 0.3, padding=1)
    monkeypatch.setattr(eager, name, mutant)
    with pytest.raises(AssertionError, match="budget"):
        assert_parity(case, "eager", 0.3, padding=1)


def test_autocast_is_a_call_on_cast_tensors():
    case = problem((6, 6), 3, dtype=F32)
    x, weight, a, b, bias = case
    with torch.autocast("cpu", BF16):
        y = ours(case, "eager", 0.2, padding=1)
    cast = (x.bfloat16(), weight.bfloat16(), a, b, bias.bfloat16())
    assert torch.equal(y, ours(cast, "eager", 0.2, padding=1))
    dy = torch.randn_like(y)
    found = results(y, case, dy)
    assert found["dx"].dtype == found["da"].dtype == F32
    forward = operators("lora_conv", "eager").forward
    with torch.autocast("cpu", BF16):
        recorded = forward(x, weight, a, b, bias, None, 0, None, 1.0, [1, 1], [1, 1], 1)[0]
    assert recorded.dtype == BF16


def test_transforms_of_torch_func():
    case = tuple(t.detach() for t in problem((4, 4), 3))
    for of in (
        lambda f: grad(lambda *t: f(t).square().sum(), (0, 2, 3))(*case),
        lambda f: jvp(lambda *t: f(t), case, case[::1]),
    ):
        torch.testing.assert_close(of(ours), of(plain))
    with pytest.raises(ValueError, match="'eager' can't serve this call: inside torch"):
        grad(lambda x: ours((x, *case[1:]), "eager").sum())(case[0])


class Net(nn.Module):
    def __init__(self, case):
        super().__init__()
        _, self.weight, a, b, bias = case
        self.a, self.b, self.bias = (nn.Parameter(t.detach()) for t in (a, b, bias))

    def forward(self, x):
        return ours((x, self.weight, self.a, self.b, self.bias), stride=2, padding=1)


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("how", "last"),
    [("compile", True), ("compile, dynamic", False), ("export", False), ("make_fx", True)],
)
def test_captures_train(how, last):
    case = problem((6, 5), 3, last=last)
    net, x = Net(case), case[0].detach()
    if how.startswith("compile"):
        torch._dynamo.reset()
        captured = torch.compile(
            net, fullgraph=True, backend="aot_eager", dynamic=how != "compile" or None
        )
    elif how == "export":
        captured = torch.export.export(net, (x,)).module()
    else:
        captured = torch.fx.experimental.proxy_tensor.make_fx(net)(x)
    expected, found = net(x), captured(x)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    found.square().sum().backward()
    owners = [p for p in (*captured.parameters(), *net.parameters()) if p.grad is not None]
    torch.testing.assert_close(tuple(p.grad for p in owners[:3]), grads)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_operators_keep_torchs_rules(impl, last):
    x, weight, a, b, bias = problem((5, 6), 3, dtype=F32, last=last)
    forward, backward = operators("lora_conv", impl)
    rest = (torch.tensor(3), 20000, None, 1.5, [2, 1], [1, 0], 1)
    # xa has no gradient, which the test of autograd's registration doesn't expect.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(forward, (x, weight, a, b, bias, *rest), test_utils=tests[:2])
    x, a, b, bias = (t.detach() for t in (x, a, b, bias))
    y, xa = forward(x, weight, a, b, bias, *rest)
    args = (torch.randn_like(y), x, xa, x.shape, weight, a, b, *rest)
    torch.library.opcheck(backward, (*args, (True, True, True, True)))
    torch.library.opcheck(backward, (args[0], None, *args[2:], (True, False, True, False)))


GOOD = dict(zip(("x", "weight", "a", "b", "bias"), problem((4, 4), 3, dtype=F32), strict=True))
X, W = GOOD["x"].detach(), GOOD["weight"]
BAD = {
    "integer x": ({"x": X.int()}, TypeError, "x: expected float16.*got torch.int32"),
    "integer W": ({"weight": W.int()}, TypeError, "weight: expected float16.*got torch.int32"),
    "W of another dtype": ({"weight": W.half()}, TypeError, "weight: expected the dtype of x"),
    "x of 2 dimensions": ({"x": X[0, 0]}, ValueError, "x: expected 4 dimensions"),
    "x of other channels": ({"x": X[:, :3]}, ValueError, r"x: expected 8 channels"),
    "A of another kernel": ({"a": GOOD["a"][..., :1]}, ValueError, r"lora_A: expected shape \[4"),
    "B of a kernel": ({"b": torch.randn(12, 4, 3, 3)}, ValueError, "lora_B: expected shape"),
    "bias": ({"bias": torch.randn(3)}, ValueError, r"bias: expected shape \[12\]"),
    "groups 0": ({"groups": 0}, ValueError, "groups: expected a divisor"),
    "groups 5": ({"groups": 5}, ValueError, "groups: expected a divisor of out_channels 12 and"),
    "groups a float": ({"groups": 2.0}, TypeError, "groups: expected an int"),
    "stride 0": ({"stride": 0}, ValueError, "stride: expected 2 ints, at least 1, got 0"),
    "three strides": ({"stride": (1, 1, 1)}, ValueError, "stride: expected 2 ints"),
    "padding below 0": ({"padding": -1}, ValueError, "padding: expected 2 ints, at least 0"),
    "padding reflect": ({"padding": "reflect"}, ValueError, "padding: expected numbers, 'same' or"),
    "same, stride": ({"padding": "same", "stride": 2}, ValueError, "padding: expected 'same' with"),
    "dilation": ({"dilation": 2}, TypeError, "dilation"),
    "p": ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a probability"),
    "seed": ({"seed": 1.5}, TypeError, "seed: expected None, an int"),
    "scaling": ({"scaling": float("nan")}, ValueError, "scaling: expected a finite number"),
    "impl": ({"impl": "cpu"}, ValueError, "'cpu' can't serve this call: has no lora_conv"),
    "kernel beyond x": ({"x": X[..., :2]}, RuntimeError, "Kernel size"),
}


@pytest.mark.parametrize(("wrong", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(wrong, error, message):
    given = {**GOOD, **wrong}
    tensors = [given.pop(name) for name in GOOD]
    with pytest.raises(error, match=message):
        lk.lora_conv2d(*tensors, **given)

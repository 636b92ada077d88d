"""A DoRA layer at its start, B = 0 and magnitude = norm, is its base layer, bit for bit."""

import copy

import pytest
import torch
from torch import nn
from torch.func import grad, jvp

import lora_kernels as lk
from lora_kernels.operands.dora import gain_of
from tests.support.implementations import skip_if_refused

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
OP = "lora_dora_linear"
# K of several of MKL's blocks: a bias that is added last rounds otherwise there.
SIZES = [((7,), 64, 48), ((2, 150), 65, 1030)]


def tensors(n, k, dtype, bias=True):
    """Return W, A, B = 0, the magnitude as PEFT forms it and a bias."""
    base = nn.Linear(k, n, bias=bias, dtype=dtype)
    a, b = torch.randn(5, k, dtype=dtype), torch.zeros(n, 5, dtype=dtype)
    magnitude = torch.linalg.norm(base.weight + 2.0 * (b @ a), dim=1).to(dtype)
    return base, (base.weight.detach(), a, b, magnitude.detach(), base.bias)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("impl", ["eager", "cpu", "auto"])
def test_the_op_is_its_base_layer(impl, p, bias, dtype):
    skip_if_refused(impl, dtype, op=OP)
    for leading, n, k in SIZES:
        base, given = tensors(n, k, dtype, bias)
        x = torch.randn(*leading, k, dtype=dtype)
        y = lk.lora_dora_linear(
            x, *given, scaling=2.0, dropout_p=p, training=True, seed=3, impl=impl
        )
        assert torch.equal(y, base(x)), (leading, n, k)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_a_new_layer_is_its_base_layer(bias, dtype):
    base = nn.Linear(1030, 65, bias=bias, dtype=dtype)
    layer = lk.LoRALinear.from_linear(base, r=5, use_dora=True, lora_dropout=0.2).to(dtype)
    assert_base(layer, base, torch.randn(2, 150, 1030, dtype=dtype))
    own = base.weight.clone()
    layer.merge()
    assert torch.equal(layer.base_layer.weight, own)


def assert_base(layer, base, x):
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            for each in (layer.train(), layer.eval()):
                for _ in range(2):  # the second finds norms kept, where they are
                    assert torch.equal(each(x), base(x)), (mode, each.training)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_patched_layer_is_its_base_layer_as_pefts(dtype):
    peft = pytest.importorskip("peft")
    base = nn.Linear(1030, 65, dtype=dtype)
    config = peft.LoraConfig(r=5, use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(base)), config, autocast_adapter_dtype=False
    )
    x = torch.randn(2, 150, 1030, dtype=dtype)
    assert_base(model, base, x)
    assert len(lk.patch_peft(model).patched) == 1
    assert_base(model, base, x)
    assert lk.report(model).layers["base_model.model.0"].fused == 8


@pytest.mark.parametrize("magnitude", [FP64, FP32, FP16, BF16], ids=str)
def test_a_gain_is_one_within_the_roundings_of_both_and_else_the_quotient(magnitude):
    norm = torch.rand(10_000, dtype=FP32) + 0.5
    near = torch.finfo(magnitude).eps / 2
    for sign in (1, -1):
        assert (gain_of((norm.double() * (1 + sign * 1e-6)).to(magnitude), norm) == 1).all()
        given = (norm.double() * (1 + sign * (3 * near + 3e-6))).to(magnitude)
        assert torch.equal(gain_of(given, norm), given.float() / norm)
    zero, one = torch.zeros(1), torch.ones(1)
    assert gain_of(zero.to(magnitude), one) == 0
    assert gain_of(one.to(magnitude), zero) == float("inf")
    assert gain_of(zero.to(magnitude), zero).isnan()
    assert gain_of(one.to(magnitude), one / 0) == 0


@pytest.mark.parametrize("impl", ["reference", "eager", "cpu", "auto"])
def test_a_start_has_the_gradients_of_any_other_point(impl):
    """Also those that torch takes through the definition, where g is a quotient, not a 1."""
    skip_if_refused(impl, FP32, op=OP)
    _, (weight, a, b, magnitude, bias) = tensors(24, 40, FP32)
    x, dy = torch.randn(6, 40), torch.randn(6, 24)
    expected = ((x @ weight.T) * dy).sum(0) / magnitude

    def loss(m, impl=impl):
        return (lk.lora_dora_linear(x, weight, a, b, m, bias, scaling=2.0, impl=impl) * dy).sum()

    m = magnitude.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(m), m)[0], expected)
    plain = "reference" if impl == "reference" else "auto"
    torch.testing.assert_close(grad(loss)(magnitude, plain), expected)
    tangent = torch.randn(24)
    found = jvp(lambda m: loss(m, plain), (magnitude,), (tangent,))[1]
    torch.testing.assert_close(found, (expected * tangent).sum())
    # By autograd through the operators' own definition.
    x, a = x.requires_grad_(), a.requires_grad_()
    dx = torch.autograd.grad(loss(m), x, create_graph=True)[0]
    assert torch.autograd.grad(dx.square().sum(), m)[0].abs().sum() > 0

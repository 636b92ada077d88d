"""Derivatives of every sort: those of the layer's definition, as PEFT's own layer gives them."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, functional, gradcheck, gradgradcheck
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from tests.support.implementations import IMPLS, skip_if_refused
from tests.support.layers import (
    KINDS,
    SCALING,
    layer_of,
    make_base,
    make_tensors,
    peft_layer,
    plain,
)

pytest.importorskip("peft")


def loss_of(f):
    return lambda *args: f(*args).square().sum()


def some_like(args):
    """Tangents and cotangents: any values, the same at each call."""
    return tuple(torch.linspace(-1, 2, t.numel()).to(t).reshape(t.shape) for t in args)


def dual_numbers(f, *args):
    with forward_ad.dual_level():
        y = f(*map(forward_ad.make_dual, args, some_like(args)))
        return forward_ad.unpack_dual(y).tangent


def batched_backward(f, *args):
    y = f(*args)
    rows = torch.eye(y.numel()).to(y).reshape(-1, *y.shape)
    return torch.autograd.grad(y, args, rows, is_grads_batched=True)


def tangent_of_backward(f, *args):
    """Of a backward whose dy alone has a tangent."""
    y = f(*args)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(*some_like([y, -y]))
        grads = torch.autograd.grad(y, args, dy)
        return [forward_ad.unpack_dual(g).tangent for g in grads]


def penalty(f, *args):
    """Gradients of a gradient penalty on x."""
    dx = torch.autograd.grad(f(*args).tanh().sum(), args[0], create_graph=True)[0]
    return torch.autograd.grad(dx.square().sum(), args, allow_unused=True)


def checkpointed(f, *args):
    y = checkpoint(f, *args, use_reentrant=False)
    return torch.autograd.grad(y.square().sum(), args)


ALL = (0, 1, 2)
# Of a function of x, lora_A and lora_B, and these three.
DERIVATIVES = {
    "grad": lambda f, *args: grad(loss_of(f), ALL)(*args),
    "vjp": lambda f, *args: vjp(f, *args)[1](*some_like([f(*args)])),
    "jvp": lambda f, *args: jvp(f, args, some_like(args))[1],
    "jvp in x": lambda f, x, a, b: jvp(lambda v: f(v, a, b), (x,), some_like([x]))[1],
    "linearize": lambda f, *args: linearize(f, *args)[1](*some_like(args)),
    "functionalize": lambda f, *args: grad(loss_of(functionalize(f)), ALL)(*args),
    "jacrev": lambda f, *args: jacrev(f, ALL)(*args),
    "jacfwd": lambda f, *args: jacfwd(f, ALL)(*args),
    "hessian": lambda f, *args: hessian(loss_of(f), ALL)(*args),
    "forward over reverse": lambda f, *args: jvp(grad(loss_of(f), ALL), args, some_like(args))[1],
    "reverse over forward": lambda f, *args: grad(
        lambda *t: jvp(f, t, some_like(args))[1].square().sum(), ALL
    )(*args),
    "vmap": lambda f, x, a, b: vmap(f, (0, None, None))(x, a, b),
    "vmap, dims": lambda f, x, a, b: vmap(lambda v: f(v, a, b), 1, 2)(torch.stack([x, -x], 1)),
    "vmap, chunks": lambda f, x, a, b: vmap(f, (0, None, None), chunk_size=2)(x, a, b),
    "vmap of adapters": lambda f, x, a, b: vmap(f, (None, 0, 0))(
        x, torch.stack([a, -a]), torch.stack([b, b.flip(0)])
    ),
    "per-sample": lambda f, *args: vmap(grad(loss_of(f), ALL), (0, None, None))(*args),
    "functional.jacobian": lambda f, *args: functional.jacobian(f, args, vectorize=True),
    "functional.jacobian, forward": lambda f, *args: functional.jacobian(
        f, args, vectorize=True, strategy="forward-mode"
    ),
    "functional.hessian": lambda f, *args: functional.hessian(loss_of(f), args),
    "functional.hessian, forward": lambda f, *args: functional.hessian(
        loss_of(f), args, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "functional.hvp": lambda f, *args: functional.hvp(loss_of(f), args, some_like(args))[1],
    "functional.vhp": lambda f, *args: functional.vhp(loss_of(f), args, some_like(args))[1],
    "functional.jvp": lambda f, *args: functional.jvp(f, args, some_like(args))[1],
    "dual numbers": dual_numbers,
    "dual numbers, no_grad": torch.no_grad()(dual_numbers),
    "is_grads_batched": batched_backward,
    "tangent of a backward": tangent_of_backward,
    "gradient penalty": penalty,
    "checkpoint": checkpointed,
}
# Those that work on tensors which require no grad in another way.
FROZEN = ("grad", "vjp", "jvp", "jvp in x", "jacfwd", "vmap", "per-sample")
FROZEN += ("functional.jacobian, forward", "dual numbers", "dual numbers, no_grad")
CASES = [(name, True) for name in DERIVATIVES] + [(name, False) for name in FROZEN]


@pytest.mark.parametrize("kind", ["peft", *KINDS])
@pytest.mark.parametrize(("name", "trained"), CASES)
def test_derivatives_are_those_of_the_definition(name, trained, kind):
    base, args = make_base(), make_tensors(trained=trained)
    derivative = DERIVATIVES[name]
    expected = derivative(plain(base), *args)
    assert any(t.any() for t in torch.utils._pytree.tree_leaves(expected) if t is not None)
    torch.testing.assert_close(derivative(layer_of(kind, base), *args), expected)


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap", "dual numbers"])
@pytest.mark.parametrize("impl", ["triton", *IMPLS])
def test_a_named_implementation_is_refused_by_name(impl, name):
    """A patched layer's is PEFT's forward then, as for other calls that it leaves."""
    base, args = make_base(), make_tensors(trained=False)
    expected = DERIVATIVES[name](plain(base), *args)
    if impl in ("eager", "reference"):  # the others don't serve float64
        patched = layer_of("patched", base, impl)
        torch.testing.assert_close(DERIVATIVES[name](patched, *args), expected)
    f = layer_of("lora_linear", base, impl)
    if impl == "reference":
        torch.testing.assert_close(DERIVATIVES[name](f, *args), expected)
        return
    with pytest.raises(ValueError, match=f"impl: '{impl}' can't serve this call"):
        DERIVATIVES[name](f, *args)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_by_vmap_trains(kind):
    x = torch.randn(3, 6, dtype=torch.float64)
    if kind == "lora_linear":
        states = [make_tensors() for _ in range(3)]
        base = make_base()
        stacked = {n: torch.stack([getattr(s, n) for s in states]).detach() for n in "ab"}
        leaves = {n: t.requires_grad_() for n, t in stacked.items()}
        y = vmap(lambda s: layer_of(kind, base)(x, s["a"], s["b"]))(leaves)
        alone = [plain(base)(x, s.a, s.b) for s in states]
        names, owners = ("a", "b"), [s._asdict() for s in states]
    else:
        layers = [peft_layer(make_base()) for _ in range(3)]
        if kind == "LoRALinear":
            layers = [lk.LoRALinear.from_linear(make_base(), r=2) for _ in range(3)]
            for layer in layers:
                nn.init.normal_(layer.lora_B.weight)
        leaves, _ = stack_module_state(layers)
        y = vmap(lambda s: functional_call(layers[0], s, (x,)))(leaves)
        alone = [layer(x) for layer in layers]
        owners = [dict(layer.named_parameters()) for layer in layers]
        names = [name for name in leaves if "lora_" in name]
    torch.testing.assert_close(y, torch.stack(alone))
    y.square().sum().backward()
    torch.stack(alone).square().sum().backward()
    for name in names:
        expected = torch.stack([owner[name].grad for owner in owners])
        torch.testing.assert_close(leaves[name].grad, expected)


@pytest.mark.parametrize("kind", ["peft", *KINDS])
def test_dropout_under_vmap_obeys_its_randomness(kind):
    base, p = make_base(), "dropout_p" if kind == "lora_linear" else "lora_dropout"
    f = layer_of(kind, base, **{p: 0.5})
    x, a, b = torch.ones(1, 6), torch.eye(6)[:2] * 1e3, torch.ones(4, 2)
    x, a, b = (t.double().expand(t.shape) for t in (x, a, b))

    def mapped(randomness):
        return vmap(lambda v: f(v, a, b), randomness=randomness)(x.expand(64, 1, 6))

    assert mapped("different").unique(dim=0).shape[0] > 1
    assert mapped("same").unique(dim=0).shape[0] == 1
    with pytest.raises(RuntimeError, match="random"):
        mapped("error")


def test_a_seed_gives_one_mask_inside_transforms_and_outside():
    base, args = make_base(), tuple(make_tensors())
    f = layer_of("lora_linear", base, dropout_p=0.4, seed=7)
    expected = torch.autograd.grad(loss_of(f)(*args), args)
    torch.testing.assert_close(grad(loss_of(f), ALL)(*args), expected)
    y, dy = f(*args), some_like(args)
    torch.testing.assert_close(vmap(f, (0, None, None))(args[0][:1], *args[1:])[0], y[0])
    dot = sum((g * t).sum() for g, t in zip(expected, dy, strict=True))
    torch.testing.assert_close(jvp(loss_of(f), args, dy)[1], dot)


@pytest.mark.parametrize("impl", ["auto", "eager", "reference"])
def test_second_derivatives_with_dropout(impl):
    base, args = make_base(), make_tensors(3)
    f = layer_of("lora_linear", base, impl, dropout_p=0.3, seed=5)
    # Frozen, it isn't an input of gradgradcheck.
    args = (*args, base.weight.detach().clone().requires_grad_())

    def of_weight(x, a, b, w):
        return lk.lora_linear(
            x, w, a, b, scaling=SCALING, dropout_p=0.3, training=True, seed=5, impl=impl
        )

    assert gradgradcheck(f, args[:3])
    assert gradcheck(of_weight, args)
    assert gradgradcheck(of_weight, args)


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_second_derivatives_are_the_references(impl, dtype):
    skip_if_refused(impl, dtype)
    base = make_base(dtype=dtype)
    args = [(t.detach() / 4).requires_grad_() for t in make_tensors(40, dtype=dtype)]
    ours, theirs = (
        penalty(layer_of("lora_linear", base, i, dropout_p=0.3, seed=5), *args)
        for i in (impl, "reference")
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for one, other in zip(ours, theirs, strict=True):
        limit = tolerance * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=limit)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_derivative_beside_a_frozen_lora_a_is_right_or_refused(kind):
    """LoRA-FA: nothing was kept of x, which a derivative of lora_B's gradient needs."""
    base, (x, a, b) = make_base(), make_tensors()
    a.requires_grad_(False)
    f = layer_of(kind, base)
    with pytest.raises(RuntimeError, match="expected lora_A to require grad for a second deriv"):
        penalty(lambda x, b: f(x, a, b), x, b)
    x = x.detach()  # then xa is a constant
    found = [
        functional.hessian(lambda b, f=f: f(x, a, b).tanh().sum(), b) for f in (f, plain(base))
    ]
    torch.testing.assert_close(*found)


@pytest.mark.slow
@pytest.mark.unpoisoned
@pytest.mark.parametrize("kind", ["peft", *KINDS])
@pytest.mark.parametrize("name", ["grad", "jvp", "vmap", "per-sample"])
def test_transforms_inside_a_compiled_graph(name, kind):
    torch._dynamo.reset()
    base, args = make_base(dtype=torch.float32), make_tensors(dtype=torch.float32, trained=False)
    model = peft_layer(base, kind == "patched")
    if kind == "LoRALinear":
        model = lk.LoRALinear.from_linear(base)

    def f(x, a, b):
        if kind == "lora_linear":
            return lk.lora_linear(x, base.weight, a, b, base.bias, scaling=SCALING)
        return model(x) * a.sum() * b.sum()

    def call(*args):
        return DERIVATIVES[name](f, *args)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), call(*args))

"""What callers do with y: they change it in place, and some give it no gradient at all."""

from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile

import lora_kernels as lk
from lora_kernels.dispatch import has_op
from lora_kernels.ops import mixed as mixed_op
from lora_kernels.testing import MIXED, MixedCase
from tests.support.implementations import IMPLS, skip_if_refused
from tests.support.quantised import drawn


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


def linear(impl):
    x, w, bias, *leaves = torch.randn(2, 3, 8), torch.randn(6, 8), leaf(6), leaf(4, 8), leaf(6, 4)
    return lk.lora_linear(x, w, *leaves, bias, impl=impl), [bias, *leaves]


def one_vector(impl):
    leaves = [leaf(4, 8), leaf(6, 4)]
    how = {"dropout_p": 0.3, "training": True, "impl": impl}
    return lk.lora_linear(torch.randn(8), torch.randn(6, 8), *leaves, **how), leaves


def dora(impl):
    leaves = [leaf(4, 8), leaf(6, 4), leaf(6)]
    return lk.lora_dora_linear(torch.randn(3, 8), torch.randn(6, 8), *leaves, impl=impl), leaves


def grouped(impl):
    leaves, ends = [leaf(2, 4, 8), leaf(2, 6, 4)], torch.tensor([1, 3], dtype=torch.int32)
    x, w = torch.randn(3, 8), torch.randn(2, 6, 8)
    return lk.grouped_lora_linear(x, w, *leaves, ends, impl=impl), leaves


def embedding(impl):
    leaves = [leaf(4, 5), leaf(6, 4)]
    return lk.lora_embedding(torch.tensor([[1, 3]]), torch.randn(5, 6), *leaves, impl=impl), leaves


def conv(impl):
    leaves = [leaf(4, 3, 3, 3), leaf(6, 4, 1, 1)]
    x, w = torch.randn(3, 5, 5), torch.randn(6, 3, 3, 3)
    return lk.lora_conv2d(x, w, *leaves, impl=impl), leaves


def conv_by_linear(impl):
    leaves, x = [leaf(4, 3, 1), leaf(6, 4, 1)], torch.randn(2, 5, 3).movedim(-1, 1)
    return lk.lora_conv1d(x, torch.randn(6, 3, 1), *leaves, impl=impl), leaves


def mixed(impl):
    inputs = MIXED.inputs(MixedCase((0, 1), 2, 8, 6, (2, 3)))
    leaves = [t.requires_grad_() for t in (*inputs.call.a, *inputs.call.b)]
    return mixed_op.run(inputs.x, inputs.call, impl), leaves


CALLS = {
    linear: "lora_linear",
    one_vector: "lora_linear",
    dora: "lora_dora_linear",
    grouped: "grouped_lora_linear",
    embedding: "lora_embedding",
    conv: "lora_conv",
    conv_by_linear: "lora_linear",
    mixed: "mixed_lora_linear",
}
calls = pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
impls = pytest.mark.parametrize("impl", IMPLS)


def called(call, impl):
    if not has_op(impl, "lora_conv" if call is conv_by_linear else CALLS[call]):
        pytest.skip(f"{impl} has no such kernel")
    skip_if_refused(impl, op=CALLS[call])
    torch.manual_seed(0)
    return call(impl)


def added(y):
    y += 1


def some_set(y):
    y[..., 0] = 0


CHANGES = {"+=": added, "relu_": torch.relu_, "[...] =": some_set}


@impls
@calls
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_output_may_be_changed_in_place(call, impl, change):
    """As torch's own layers': no view of what a body allocated, which autograd refuses."""
    y, leaves = called(call, impl)
    plain = y.clone()
    change(plain)
    expected = torch.autograd.grad(plain.square().sum(), leaves, retain_graph=True)
    change(y)
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves), expected)


@calls
def test_an_output_may_be_changed_while_it_is_profiled(call):
    """The body is called by torch's dispatcher then."""
    with profile():
        y, _ = called(call, "auto")
        y += 1
    y.sum().backward()


class NoGradient(torch.autograd.Function):
    """The identity; what it is given gets no gradient."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@impls
@calls
def test_parameters_have_no_gradient_where_the_output_has_none(call, impl):
    """Zeros would let an optimizer move them, by decay and momentum."""
    y, leaves = called(call, impl)
    NoGradient.apply(y).sum().backward()
    assert [leaf.grad for leaf in leaves] == [None] * len(leaves)


@pytest.mark.parametrize("op", ["lora_linear", "lora_dora_linear"])
def test_an_operators_results_may_all_be_without_a_gradient(op):
    """As one in a captured graph, whose autograd kernel knows other results besides."""
    x, w, a, b = torch.randn(3, 8), torch.randn(6, 8), leaf(4, 8), leaf(6, 4)
    others = (w, None, None, a, b, None, None, 0, None, 1.0)
    flat = (x, torch.ones(6), *others) if op == "lora_dora_linear" else (x, *others)
    y = getattr(torch.ops.lora_kernels, f"{op}_forward_eager").default(*flat)[0]
    NoGradient.apply(y).sum().backward()
    assert [a.grad, b.grad] == [None, None]


def quantised(name, impl):
    leaves, w = [leaf(4, 64), leaf(6, 4)], drawn(name, 6, 64)
    return lk.lora_linear(torch.randn(3, 64), w, *leaves, impl=impl), leaves


def packed(impl):
    layer = lk.LoRALinear(8, 6, r=4, impl=impl)
    torch.nn.init.normal_(layer.lora_B.weight)
    lk.prepack_(layer)
    return layer(torch.randn(3, 8)), [layer.lora_A.weight, layer.lora_B.weight]


LISTS = {
    "nf4": partial(quantised, "nf4"),
    "int8": partial(quantised, "int8"),
    "packed": packed,
    "mixed": mixed,
}


@impls
@pytest.mark.parametrize("call", LISTS.values(), ids=LISTS)
def test_a_batch_of_gradients_where_an_operator_has_lists_of_tensors(call, impl):
    """torch calls other operators of ours for each gradient of the batch."""
    skip_if_refused(impl, op="mixed_lora_linear" if call is mixed else "lora_linear")
    y, leaves = call(impl)
    expected = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    batch = torch.stack([torch.ones_like(y), 2 * torch.ones_like(y)])
    found = torch.autograd.grad(y, leaves, batch, is_grads_batched=True)
    for grads, one in zip(found, expected, strict=True):
        torch.testing.assert_close(grads[0], one, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads[1], 2 * one, rtol=1e-5, atol=1e-5)


def test_a_graph_of_make_fx_takes_a_packed_weight_itself():
    layer, x = lk.LoRALinear(8, 6, r=4), torch.randn(3, 8)
    torch.nn.init.normal_(layer.lora_B.weight)
    lk.prepack_(layer)
    parameters = dict(layer.named_parameters())

    def f(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,))

    expected = f(parameters, x)
    torch.testing.assert_close(make_fx(f)(parameters, x)(parameters, x), expected)

"""Calls with quantised weights: the dense call's with the decoded W, and no more saved than it."""

import pytest
import torch
from torch.export import export
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.operands.weight import Dense
from lora_kernels.registration import operators
from lora_kernels.testing import Case, assert_results, make_inputs, run
from tests.support.closeness import assert_close
from tests.support.implementations import linear_call
from tests.support.quantised import COMPILED, FORMATS, ON_CPUS, drawn, expected

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
IMPLS = ("auto", "cpu", "eager", "reference") if COMPILED else ("auto", "eager", "reference")
EIGHT_BITS = [name for name in FORMATS if "4" not in name]


def with_weight(inputs, weight):
    """Return the inputs with a weight and those with W itself, which the oracle takes."""
    decoded = expected(weight, inputs.x.dtype)
    return type(inputs)(**{**vars(inputs), "weight": weight}), type(inputs)(
        **{**vars(inputs), "weight": decoded}
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_parity_with_the_decoded_weight(impl, name, dtype):
    if (impl, dtype) == ("cpu", FP16):
        pytest.skip("the compiled part has no float16")
    for leading, n, k, r, p in (((5,), 9, 33, 3, 0.0), ((2, 65), 136, 200, 8, 0.1)):
        case = Case(leading, n, k, r, dtype, FP32, p)
        given, decoded = with_weight(make_inputs(case), drawn(name, n, k))
        assert_results(case, decoded, run(case, given, impl), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_w_by_an_identity(impl, name, dtype):
    """Forward and backward multiply by the very numbers that the format means."""
    n, k = 72, 88  # rows end inside blocks
    weight, a, b = drawn(name, n, k), torch.zeros(1, k, dtype=dtype), torch.zeros(n, 1, dtype=dtype)
    x = torch.eye(k, dtype=dtype).requires_grad_()
    y = lk.lora_linear(x, weight, a, b, impl=impl)
    assert torch.equal(y.T, expected(weight, dtype))
    x = torch.zeros(n, k, dtype=dtype, requires_grad=True)
    lk.lora_linear(x, weight, a, b, impl=impl).backward(torch.eye(n, dtype=dtype))
    assert torch.equal(x.grad, expected(weight, dtype))


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_who_lacks_a_format_refuses_it_by_name(impl, name):
    weight = drawn(name, 8, 64)
    x, a, b = torch.randn(3, 64), torch.randn(2, 64), torch.randn(8, 2)
    message = f"reads weights of format dense.*, got {weight.format}$"
    with pytest.raises(ValueError, match=f"{impl!r} can't serve this call: {message}"):
        lk.lora_linear(x, weight, a, b, impl=impl)
    found = lk.explain(x, weight, a, b)
    assert (found.choice, found.format) == (ON_CPUS, weight.format)
    assert f"auto -> {ON_CPUS}, weight in {weight.format}" in str(found)
    assert f"got {weight.format}" in found.reasons[impl]


def call_of(name, n=8, k=64, dtype=FP32):
    x = torch.randn(5, k, dtype=dtype, requires_grad=True)
    a, b = (torch.randn(s, dtype=dtype).requires_grad_() for s in ((3, k), (n, 3)))
    return x, drawn(name, n, k), a, b


def gradients(function, *leaves):
    y = function(*leaves)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def assert_same(actual, wanted):
    for t, other in zip(actual, wanted, strict=True):
        assert_close(t, other, 0.016 if t.dtype == BF16 else 1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_no_decoded_weight_is_saved(name):
    x, weight, a, b = call_of(name)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lk.lora_linear(x, weight, a, b).sum()
    held = {t.data_ptr() for t in (weight.stored, *weight.parts)}
    assert held <= {t.data_ptr() for t in saved}
    assert not any(t.shape == weight.shape and t.is_floating_point() for t in saved
                   if t.data_ptr() not in held)  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_scale_changed_between_forward_and_backward_is_told(name):
    x, weight, a, b = call_of(name)
    y = lk.lora_linear(x, weight, a, b)
    weight.parts[0].add_(1)
    with pytest.raises(RuntimeError, match="got one that was changed in place since"):
        y.sum().backward()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(name, reentrant):
    x, weight, a, b = call_of(name)
    call = lambda x, a, b: lk.lora_linear(x, weight, a, b)  # noqa: E731
    again = lambda *t: checkpoint(call, *t, use_reentrant=reentrant)  # noqa: E731
    assert_same(backward_of(again, x, a, b), backward_of(call, x, a, b))


def backward_of(function, *leaves):
    leaves = [t.detach().requires_grad_() for t in leaves]
    function(*leaves).square().sum().backward()
    return [t.grad for t in leaves]


@pytest.mark.parametrize("name", FORMATS)
def test_autocast(name):
    x, weight, a, b = call_of(name)
    with torch.autocast("cpu", BF16):
        y = lk.lora_linear(x, weight, a, b)
        wanted = lk.lora_linear(x, expected(weight, BF16), a, b)
    assert y.dtype == BF16
    assert_same([y, *torch.autograd.grad(y.sum(), (x, a, b))],
                [wanted, *torch.autograd.grad(wanted.sum(), (x, a, b))])  # fmt: skip


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", FORMATS)
def test_compiled_and_exported(name):
    x, weight, a, b = call_of(name)

    class Layer(torch.nn.Module):
        def forward(self, x, a, b):
            return lk.lora_linear(x, weight, a, b)

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, x, a, b), gradients(layer, x, a, b))
    program = export(layer, (x.detach(), a.detach(), b.detach()))
    assert_same([program.module()(x, a, b)], [layer(x, a, b)])
    plain = program.run_decompositions()
    assert not any("lora_kernels" in str(node.target) for node in plain.graph.nodes)
    assert_same([plain.module()(x, a, b)], [layer(x, a, b)])


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("name", FORMATS)
def test_operators_pass_opcheck(impl, name):
    weight = drawn(name, 8, 64)
    call = linear_call(weight.decode(), torch.randn(3, 64), torch.randn(8, 3), None, None)
    call = call._replace(weight=weight)
    forward, backward = operators("lora_linear", impl)
    x = torch.randn(5, 64)
    # torch can't compare float8 before and after a call, which is the schema's test.
    tests = ["test_schema"] * (weight.format != "float8")
    tests += ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(forward, (x, *call.flat()), test_utils=tests)
    y, xa = forward(x, *call.flat())
    wanted = [True, True, True, False]
    given = (y, x, xa, *call.flat_backward(), wanted)
    torch.library.opcheck(backward, given, test_utils=tests)


@pytest.mark.parametrize("name", FORMATS)
def test_derivatives(name):
    x, weight, a, b = call_of(name, n=3, k=32, dtype=torch.float64)
    call = lambda x, a, b: lk.lora_linear(x, weight, a, b)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, a, b))
    assert torch.autograd.gradgradcheck(call, (x, a, b))
    mapped = torch.func.vmap(call, (0, None, None))(torch.stack([x, x]), a, b)
    torch.testing.assert_close(mapped[1], call(x, a, b))


def test_the_base_product_is_a_call_of_rank_0():
    """What a patched layer without an adapter makes of its weight."""
    weight, x = drawn("nf4", 8, 64), torch.randn(5, 64, requires_grad=True)
    for impl in IMPLS:
        y = lk.lora_linear(x, weight, x.new_empty(0, 64), x.new_empty(8, 0), impl=impl)
        torch.testing.assert_close(y, x @ weight.decode().T)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], weight.decode().sum(0)
                                   .expand(5, 64))  # fmt: skip
    with pytest.raises(ValueError, match="lora_A: expected a rank of at least 1"):
        lk.lora_linear(x, weight.decode(), x.new_empty(0, 64), x.new_empty(8, 0))


def test_shapes_and_dtypes_are_checked_against_the_weight():
    weight, a, b = drawn("nf4", 8, 64), torch.randn(2, 64), torch.randn(8, 2)
    x = torch.randn(3, 64)
    bad = {
        "weight: expected shape \\[N, 8\\].*weight looks transposed": (x[:, :8], a, b, None),
        "lora_A: expected shape \\[R, 64\\]": (x, a[:, 1:], b, None),
        "bias: expected shape \\[8\\]": (x, a, b, torch.zeros(7)),
        "bias: expected the dtype of x": (x, a, b, torch.zeros(8, dtype=BF16)),
        "x: expected float16": (x.long(), a, b, None),
    }
    for message, (x, a, b, bias) in bad.items():
        with pytest.raises((TypeError, ValueError), match=message):
            lk.lora_linear(x, weight, a, b, bias)


def test_a_dense_call_has_no_more_to_carry():
    weight = torch.randn(8, 64)
    call = linear_call(weight, torch.randn(2, 64), torch.randn(8, 2))
    assert call.flat()[:3] == (weight, None, None)
    assert Dense(weight).form is None

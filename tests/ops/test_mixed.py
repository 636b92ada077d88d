"""mixed_lora_linear beside the parity suite: lists of factors, derivatives, captures, bad input."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from lora_kernels.native import absence
from lora_kernels.operands.dropout import Dropout
from lora_kernels.ops import mixed as op
from lora_kernels.registration import operators
from lora_kernels.testing import MIXED, MixedCase

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
needs_cpu = pytest.mark.skipif(absence("cpu") is not None, reason=str(absence("cpu")))
impls = pytest.mark.parametrize(
    "impl", [pytest.param("cpu", marks=needs_cpu), "eager", "reference"]
)
CASE = MixedCase((1, 0, -1, 2, 0), 3, 24, 40, (8, 2, 5))


def problem(case=CASE):
    """Return x and a call whose factors require grad."""
    inputs = MIXED.inputs(case)
    for t in (*inputs.call.a, *inputs.call.b):
        t.requires_grad_()
    return inputs.x, inputs.call


@impls
def test_only_the_gradients_asked_for(impl):
    """Of one adapter's A and another's B: none is another's."""
    inputs = MIXED.inputs(CASE)
    for wanted in (("dx",), ("da1",), ("db2",), ("dbias",), ("da0", "db1")):
        actual = MIXED.call(CASE, inputs, impl, wanted)
        assert actual.keys() == {"y", *wanted}
        MIXED.assert_results(CASE, inputs, actual, impl)


@impls
def test_each_sample_is_as_alone(impl):
    """Also bit for bit as in another order of samples, where rows of an adapter aren't adjacent."""
    x, call = problem(replace(CASE, owners=(1, 1, 0, 2, -1), each=9))
    y = op.run(x, call, impl)
    order = torch.tensor([2, 0, 4, 1, 3])
    rows = (order.unsqueeze(1) * 9 + torch.arange(9)).view(-1)
    other = op.run(x[rows], call._replace(owners=call.owners[order]), impl)
    torch.testing.assert_close(other, y[rows])
    for i, owner in enumerate(call.owners.tolist()):
        some = x[9 * i : 9 * i + 9]
        alone = some @ call.weight.T + call.bias
        if owner >= 0:
            alone = alone + call.scalings[owner] * (some @ call.a[owner].T @ call.b[owner].T)
        torch.testing.assert_close(y[9 * i : 9 * i + 9], alone, rtol=1e-4, atol=1e-4)


def test_gradients_and_second_derivatives():
    x, call = problem(replace(CASE, owners=(1, -1, 0), each=2, n=6, k=5, ranks=(2, 1), dtype=F64))
    x.requires_grad_()
    call = call._replace(dropout=Dropout(torch.tensor(3), 20000))

    def y_of(x, *factors):
        return op.run(x, call._replace(a=list(factors[:2]), b=list(factors[2:])), "auto")

    assert gradcheck(y_of, (x, *call.a, *call.b))
    assert gradgradcheck(y_of, (x, *call.a, *call.b))


@impls
def test_operators_pass_opcheck(impl):
    x, call = problem()
    both, flat = operators(op.OP, impl), call.flat()
    torch.library.opcheck(both.forward, (x, None, *flat))
    y, xa = (t.detach() for t in both.forward(x, None, *flat))
    torch.library.opcheck(
        both.backward, (torch.ones_like(y), x, xa, *flat, [True, True, True, True]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


class Layer(nn.Module):
    """A call whose factors are parameters."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.a = nn.ParameterList(t.detach() for t in call.a)
        self.b = nn.ParameterList(t.detach() for t in call.b)

    def forward(self, x, owners):
        call = self.call._replace(a=list(self.a), b=list(self.b), owners=owners)
        return op.run(x, call, "auto").sin()


def test_compiled_whole_and_for_other_owners():
    x, call = problem()
    layer = Layer(call)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for owners in (call.owners, call.owners.flip(0)):
        expected, got = (
            torch.autograd.grad(f(x, owners).sum(), list(layer.parameters()))
            for f in (layer, compiled)
        )
        torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


def test_exported_graph_trains():
    x, call = problem()
    layer = Layer(call)
    exported = torch.export.export(layer, (x, call.owners)).module()
    for module in (layer, exported):
        module(x, call.owners).square().sum().backward()
    for ours, theirs in zip(exported.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert layer.a[0].grad.any()


def test_autocast_casts_what_comes_first():
    x, call = problem()
    both = operators(op.OP, "eager")
    with torch.autocast("cpu", BF16):
        y, xa = both.forward(x.to(BF16), None, *call.flat())
        dx, da, _, _ = both.backward(y.to(BF16), x, xa, *call.flat(), [True] * 4)
    assert y.dtype == dx.dtype == da[0].dtype == F32


def test_factors_are_read_where_they_lie():
    """Nothing of all adapters' size is saved, nor made: each factor is one of the saved tensors."""
    x, call = problem()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        op.run(x, call, "auto")
    given = {t.data_ptr() for t in (x, call.weight, call.owners, call.scalings, *call.a, *call.b)}
    assert {t.data_ptr() for t in (*call.a, *call.b)} <= {t.data_ptr() for t in kept}
    assert [t.shape for t in kept if t.data_ptr() not in given] == [(len(x), 8)]


@impls
def test_a_weight_that_is_trained_is_refused(impl):
    x, call = problem()
    call.weight.requires_grad_()
    with pytest.raises(TypeError, match="weight: expected a frozen weight"):
        op.run(x, call, impl)
    with pytest.raises(TypeError, match="weight: expected a frozen weight"):
        operators(op.OP, impl).forward(x, None, *call.flat())


BAD = {
    "no A": ({"a": []}, "lora_B: expected 0 tensors, got 3"),
    "A's K": ({"a": [torch.ones(8, 39)] * 3}, r"lora_A, lora_B: expected shapes \[R, 40\]"),
    "A's rank": ({"a": [torch.ones(3, 40)] * 3}, "lora_A, lora_B: expected shapes"),
    "A of integers": ({"a": [torch.ones(8, 40).int()] * 3}, "lora_A: expected float16"),
    "W's dtype": ({"weight": torch.ones(24, 40, dtype=F64)}, "weight: expected the dtype of x"),
    "W's shape": ({"weight": torch.ones(24, 41)}, "weight: expected shape"),
    "bias of W's K": ({"bias": torch.ones(40)}, r"bias: expected shape \[24\]"),
    "scalings few": ({"scalings": torch.ones(2, dtype=F64)}, "scalings: expected 3 numbers"),
    "scalings of float32": ({"scalings": torch.ones(3)}, "scalings: expected 3 numbers of float64"),
    "owners of int64": ({"owners": torch.zeros(5).long()}, "owners: expected int32"),
    "owners of other rows": ({"owners": torch.zeros(4).int()}, "owners: expected a divisor of 15"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, message = BAD[case]
    x, call = problem()
    with pytest.raises((TypeError, ValueError), match=message):
        op.check(x, call._replace(**change))


_OF_C = [case for case in BAD if case != "owners of int64"]  # which it reads, too


@needs_cpu
@pytest.mark.parametrize("case", [*_OF_C, "owner 3", "owner -2", "x's K"])
def test_the_compiled_part_checks_for_itself(case):
    x, call = problem()
    change = BAD[case][0] if case in BAD else {}
    if case.startswith("owner "):
        change = {"owners": torch.tensor([0, 0, 0, 0, int(case[6:])], dtype=torch.int32)}
    x = x[:, :-1] if case == "x's K" else x
    call = call._replace(**change)
    with torch.no_grad(), pytest.raises(RuntimeError, match=": expected"):
        operators(op.OP, "cpu").forward(x, call.bias, *call.flat())


@impls
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
def test_tensors_whose_memory_is_gone_are_refused_by_name(name, impl):
    x, call = problem()
    call = call._replace(a=[t.detach() for t in call.a], b=[t.detach() for t in call.b])
    op.run(x, call, impl)
    given = {"x": x, "weight": call.weight, "lora_A": call.a[1], "lora_B": call.b[2]}
    given[name].untyped_storage().resize_(given[name].untyped_storage().nbytes() // 2)
    with pytest.raises((RuntimeError, ValueError), match=f"{name}: expected memory"):
        op.run(x, call, impl)

"""grouped_lora_linear beside the parity suite: layouts, masks, derivatives, captures, bad input."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.nn.functional import pad

import lora_kernels as lk
from lora_kernels.impl.eager import grouped_mm
from lora_kernels.native import absence
from lora_kernels.operands.call import Adapter, Wanted
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.grouped import GroupedCall
from lora_kernels.registration import operators
from lora_kernels.testing import GRADIENTS, GROUPED, GroupedCase

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
needs_cpu = pytest.mark.skipif(absence("cpu") is not None, reason=str(absence("cpu")))
impls = pytest.mark.parametrize(
    "impl", [pytest.param("cpu", marks=needs_cpu), "eager", "reference"]
)


def ends(*sizes):
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def problem(sizes=(3, 0, 4), n=6, k=5, r=2, dtype=F64):
    """Return x, W, A, B and offsets; A and B require grad."""
    x, weight = torch.randn(sum(sizes), k).to(dtype), torch.randn(len(sizes), n, k).to(dtype)
    a = torch.randn(len(sizes), r, k).to(dtype).requires_grad_()
    b = torch.randn(len(sizes), n, r).to(dtype).requires_grad_()
    return x, weight, a, b, ends(*sizes)


@impls
def test_each_group_is_a_layer_of_its_own(impl):
    """Against lora_linear group by group, each with numbers of its own: none is another's."""
    x, weight, a, b, offsets = problem((4, 0, 2, 9), n=5, k=5, r=4, dtype=F32)
    y = lk.grouped_lora_linear(x, weight, a, b, offsets, scaling=0.7, impl=impl)
    begin = 0
    for g, end in enumerate(offsets.tolist()):
        alone = lk.lora_linear(x[begin:end], weight[g], a[g], b[g], scaling=0.7, impl="reference")
        torch.testing.assert_close(y[begin:end], alone)
        begin = end


@impls
def test_a_mask_is_of_the_place_not_of_the_order_of_sorting(impl):
    """Equal groups' rows permuted: y, put back, is the same bit for bit, and so is x's gradient."""
    count, sizes = 40, (13, 0, 27)
    case = GroupedCase(sizes, 16, 24, 4, dropout_p=0.4, tokens=10, scatter=True, bias=False)
    inputs = GROUPED.inputs(case)
    within = torch.cat([torch.randperm(13), 13 + torch.randperm(27)])
    groups = inputs.groups
    permuted = groups._replace(rows=groups.rows[within], scatter=groups.scatter[within])
    first = GROUPED.call(case, inputs, impl)
    second = GROUPED.call(case, replace(inputs, groups=permuted), impl)
    assert count == case.count
    assert first["y"].equal(second["y"])
    torch.testing.assert_close(first["dx"], second["dx"])
    keep = lk.dropout_mask((count, 24), 0.4, seed=inputs.seed)
    x = inputs.x[groups.rows]
    shrunk = torch.where(keep[groups.scatter], x, 0) / (1 - round(0.4 * 65536) / 65536)
    g = 2
    some = slice(13, 40)
    expected = x[some] @ inputs.weight[g].T
    expected = expected + 1.7 * (shrunk[some] @ inputs.lora_A[g].T) @ inputs.lora_B[g].T
    torch.testing.assert_close(first["y"][groups.scatter[some]], expected, rtol=1e-4, atol=1e-4)


@impls
def test_rows_without_a_group_are_zeros_and_take_no_part(impl):
    x, weight, a, b, offsets = problem((3, 4), dtype=F32)
    x = torch.cat([x, torch.full((2, 5), float("nan"))]).requires_grad_()
    y = lk.grouped_lora_linear(x, weight, a, b, offsets, impl=impl)
    assert not y[7:].any()
    dx, da, db = torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
    assert not dx[7:].any()
    assert all(torch.isfinite(t).all() for t in (dx, da, db))
    flat = (weight, a.detach(), b.detach(), offsets, *(None,) * 5, 0, None, 1.0)
    xa = operators("grouped_lora_linear", impl).forward(x.detach(), None, *flat)[1]
    assert not xa[7:].any()
    places = torch.tensor([8, 6, 4, 2, 0, 1, 3, 5, 7])
    back = lk.grouped_lora_linear(x, weight, a, b, offsets, scatter=places, impl=impl)
    torch.testing.assert_close(back[places], y)


@impls
def test_an_empty_group_gets_zeros_and_a_frozen_factor_none(impl):
    x, weight, a, b, offsets = problem((3, 0, 4), dtype=F32)
    b = b.detach()
    y = lk.grouped_lora_linear(x, weight, a, b, offsets, impl=impl)
    (da,) = torch.autograd.grad(y.sum(), (a,))
    assert not da[1].any()
    assert da[0].any()


def test_gradients_and_second_derivatives():
    x, weight, a, b, offsets = problem()
    x.requires_grad_()
    bias = torch.randn(3, 6, dtype=F64, requires_grad=True)
    rows = torch.tensor([0, 1, 1, 2, 0, 6, 3])

    def call(x, a, b, bias):
        return lk.grouped_lora_linear(
            x, weight, a, b, offsets, bias, rows=rows, scaling=0.5, dropout_p=0.3, training=True,
            seed=3,
        )  # fmt: skip

    assert gradcheck(call, (x, a, b, bias))
    assert gradgradcheck(call, (x, a, b, bias))


def test_transforms_compute_by_plain_torch():
    x, weight, a, b, offsets = problem()

    def loss(a):
        return lk.grouped_lora_linear(x, weight, a, b, offsets).square().sum()

    expected = torch.autograd.grad(loss(a), a)[0]
    torch.testing.assert_close(grad(loss)(a.detach()), expected)
    stacked = torch.stack([a.detach(), a.detach() * 2])
    torch.testing.assert_close(vmap(loss)(stacked)[0], loss(a))
    with pytest.raises(ValueError, match="'eager' can't serve this call"):
        grad(lambda a: lk.grouped_lora_linear(x, weight, a, b, offsets, impl="eager").sum())(a)


@impls
def test_operators_pass_opcheck(impl):
    x, weight, a, b, offsets = problem(dtype=F32)
    both, rows = operators("grouped_lora_linear", impl), torch.tensor([0, 1, 2, 0, 1, 2, 6])
    flat = (weight, a, b, offsets, rows, None, None, None, None, 0, None, 0.5)
    torch.library.opcheck(both.forward, (x, None, *flat))
    y, xa = both.forward(x, None, *flat)
    torch.library.opcheck(
        both.backward, (torch.ones_like(y), x, xa.detach(), 7, *flat, [True, True, True, True]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_whole_and_for_another_routing(backend):
    x, weight, a, b, offsets = problem(dtype=F32)
    rows = torch.tensor([0, 1, 2, 0, 1, 2, 6])

    def call(x, a, offsets, rows):
        return lk.grouped_lora_linear(x, weight, a, b, offsets, rows=rows).sin()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for each in (offsets, ends(1, 5, 1), ends(7, 0, 0)):
        expected, got = (
            torch.autograd.grad(f(x, a, each, rows).sum(), (a, b)) for f in (call, compiled)
        )
        torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


def test_exported_graph_trains():
    x, weight, a, b, offsets = problem(dtype=F32)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(a.detach()), nn.Parameter(b.detach())

        def forward(self, x, offsets):
            return lk.grouped_lora_linear(x, weight, self.a, self.b, offsets)

    layer = Layer()
    exported = torch.export.export(layer, (x, offsets)).module()
    for module in (layer, exported):
        module(x, offsets).square().sum().backward()
    torch.testing.assert_close(exported.a.grad, layer.a.grad)
    assert layer.a.grad.any()


def test_autocast_casts_x_alone():
    x, weight, a, b, offsets = problem(dtype=F32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lk.grouped_lora_linear(x.bfloat16(), weight, a, b, offsets)
        again = torch.ops.lora_kernels.grouped_lora_linear_forward_eager(
            x.bfloat16(), None, weight, a, b, offsets, None, None, None, None, None, 0, None, 1.0
        )[0]
    assert y.dtype == again.dtype == F32
    expected = lk.grouped_lora_linear(x.bfloat16().float(), weight, a, b, offsets)
    torch.testing.assert_close(y, expected)


def test_saves_x_as_given_and_nothing_like_the_weights():
    case = GroupedCase((20,) * 8, 32, 48, 4, BF16, F32, tokens=40, bias=False)
    inputs, kept = GROUPED.inputs(case), []
    a, b = inputs.lora_A.requires_grad_(), inputs.lora_B.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lk.grouped_lora_linear(
            inputs.x, inputs.weight, a, b, inputs.groups.offsets, rows=inputs.groups.rows
        )
    given = {
        t.data_ptr()
        for t in (inputs.x, inputs.weight, a, b, *filter(lambda t: t is not None, inputs.groups))
    }
    extra = sum(t.numel() for t in kept if t.data_ptr() not in given)
    assert extra == case.count * case.r


# The compiled part raises RuntimeError.
REFUSALS = (TypeError, ValueError, RuntimeError)
_TO_3 = torch.tensor([0, 1, 3]).int()
_BELOW = torch.tensor([0, 1, -2]).int()
BAD = {
    "offsets of int64": ({"offsets": torch.tensor([3, 3, 7])}, "offsets: expected a tensor of"),
    "offsets too few": ({"offsets": ends(3, 4)}, "adapters: expected a number of each of 2"),
    "offsets descending": ({"offsets": torch.tensor([3, 2, 7]).int()}, "offsets: expected ends in"),
    "offsets beyond": ({"offsets": ends(3, 0, 5)}, "offsets: expected"),
    "offsets negative": ({"offsets": torch.tensor([-1, 2, 7]).int()}, "offsets: expected"),
    "no offsets": ({"offsets": None}, "offsets: expected a tensor of int32, got NoneType"),
    "rows of floats": ({"rows": torch.zeros(7)}, "rows: expected a tensor of int32 or int64"),
    "rows beyond": ({"rows": torch.full((7,), 7)}, "rows: expected numbers"),
    "rows negative": ({"rows": torch.full((7,), -1)}, "rows: expected numbers"),
    "scatter short": ({"scatter": torch.arange(6)}, "scatter: expected a number of each of 7"),
    "scatter beyond": ({"scatter": torch.arange(1, 8)}, "scatter: expected numbers"),
    "adapter beyond": ({"adapters": _TO_3}, "adapters: expected numbers from -1 to 2, got 3"),
    "adapter -2": ({"adapters": _BELOW}, "adapters: expected numbers from -1 to 2, got -2"),
    "weight beyond": ({"weights": _TO_3}, "weights: expected numbers from 0 to 2, got 3"),
    "weight -2": ({"weights": _BELOW}, "weights: expected numbers from 0 to 2, got -2"),
    "weight trained": (
        {"weight": torch.randn(3, 6, 5, requires_grad=True)}, "weight: expected frozen weights"
    ),
    "weight of 2-D": ({"weight": torch.randn(6, 5)}, "weight: expected 3 dimensions"),
    "weight's K": ({"weight": torch.randn(3, 6, 4)}, "weight: expected shape"),
    "weight's dtype": ({"weight": torch.randn(3, 6, 5).bfloat16()}, "weight: expected the dtype"),
    "A's rank": ({"lora_A": torch.randn(3, 3, 5)}, "lora_A, lora_B: expected shapes"),
    "B's groups": ({"lora_B": torch.randn(2, 6, 2)}, "lora_A, lora_B: expected shapes"),
    "bias of one group": ({"bias": torch.randn(6)}, "bias: expected 2 dimensions"),
    "scalings too few": ({"scaling": torch.ones(2)}, "scaling: expected shape"),
    "scaling trained": (
        {"scaling": torch.ones(3, requires_grad=True)}, "scaling: expected a float tensor"
    ),
    "scaling nan": ({"scaling": float("nan")}, "scaling: expected a finite number"),
    "x of 3-D": ({"x": torch.randn(7, 1, 5)}, "x: expected 2 dimensions"),
    "x of integers": ({"x": torch.zeros(7, 5, dtype=torch.int64)}, "x: expected float16"),
    "p of 1": ({"dropout_p": 1.0}, "dropout_p: expected a probability"),
    "impl without it": ({"impl": "cuda"}, "has no grouped_lora_linear"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@impls
def test_bad_input(case, impl):
    change, message = BAD[case]
    x, weight, a, b, offsets = problem(dtype=F32)
    given = {"x": x, "weight": weight, "lora_A": a, "lora_B": b, "offsets": offsets, "impl": impl}
    with pytest.raises(REFUSALS, match=message):
        lk.grouped_lora_linear(**given | change)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "offsets"])
@impls
def test_tensors_whose_memory_is_gone_are_refused_by_name(name, impl):
    x, weight, a, b, offsets = problem(dtype=F32)
    given = {
        "x": x,
        "weight": weight,
        "lora_A": a.detach(),
        "lora_B": b.detach(),
        "offsets": offsets,
    }
    lk.grouped_lora_linear(**given, impl=impl)
    given[name].untyped_storage().resize_(0)
    with pytest.raises(REFUSALS, match=f"{name}: expected memory"):
        lk.grouped_lora_linear(**given, impl=impl)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, F32], ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"tokens": 30},
        {"tokens": 30, "scatter": True, "dropout_p": 0.3},
        {"spare": 5, "stored": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("sizes", "r"),
    [((5, 0, 33, 1, 70), 4), ((5, 0, 33, 1, 20), 4), ((0, 3, 0), 8), ((9,) * 6, 1)],
)
def test_by_torch_s_grouped_mm(sizes, r, how, adapter_dtype, dtype):
    """As eager serves experts on a GPU of Hopper's or Blackwell's kind; here by its CPU kernel."""
    case = GroupedCase(sizes, 72, 40, r, dtype, adapter_dtype, **how)
    inputs = GROUPED.inputs(case)
    dropout = drawn(case.dropout_p, inputs.seed, inputs.x.device)
    adapter = Adapter(inputs.lora_A, inputs.lora_B, inputs.scaling)
    call = GroupedCall(inputs.weight, adapter, inputs.bias, inputs.groups, dropout, len(inputs.x))
    assert grouped_mm.fits(inputs.x, call)
    assert not grouped_mm.serves(inputs.x, call)
    y, xa = grouped_mm.forward(inputs.x, call)
    grads = grouped_mm.backward(inputs.dy, inputs.x, xa, call, Wanted(True, True, True, True))
    results = dict(zip(("y", *GRADIENTS), (y, *grads), strict=True))
    # Ranks are filled up to whole rows of 16 bytes. Eager's must be, too: its product with a vector
    # sums in other parts, and errs by so much less that 1 of 1,000 draws left the budget.
    more = -r % (16 // dtype.itemsize)
    filled = replace(
        inputs, lora_A=pad(inputs.lora_A, (0, 0, 0, more)), lora_B=pad(inputs.lora_B, (0, more))
    )
    results |= {"da": pad(grads.da, (0, 0, 0, more)), "db": pad(grads.db, (0, more))}
    if dtype == F32 and max(sizes) == 70:
        # A chain of 70 numbers errs by so much more than eager's sum that 1 of 40 draws leaves its
        # budget. Shorter ones don't.
        del results["dbias"]
    GROUPED.assert_results(replace(case, r=r + more), filled, results, "grouped_mm")
    assert xa.shape == (case.count, r)


def test_what_grouped_mm_does_not_take():
    inputs = GROUPED.inputs(GroupedCase((3, 4), 72, 40, 4, BF16))
    adapter = Adapter(inputs.lora_A, inputs.lora_B, 1.0)
    call = GroupedCall(inputs.weight, adapter, None, inputs.groups, None, 7)
    assert grouped_mm.fits(inputs.x, call)
    numbers = torch.zeros(2, dtype=torch.int32)
    for other in (
        call._replace(weight=inputs.weight[..., :39]),
        call._replace(weight=inputs.weight[:, ::2, ::2]),
        call._replace(groups=inputs.groups._replace(adapters=numbers)),
        call._replace(groups=inputs.groups._replace(weights=numbers)),
    ):
        assert not grouped_mm.fits(inputs.x, other)
    assert not grouped_mm.fits(inputs.x.half(), call)


def test_explain_takes_groups():
    x, weight, a, b, offsets = problem(dtype=F32)
    found = lk.explain(lk.grouped_lora_linear, x, weight, a, b, offsets)
    assert found.choice == ("cpu" if absence("cpu") is None else "eager")
    assert "has no grouped_lora_linear" in found.reasons["cuda"]

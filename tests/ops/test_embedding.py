"""lora_embedding: against float64 and PEFT, gradients, what is saved, captures, bad input."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import lora_kernels as lk
from lora_kernels.impl.eager import embedding as eager
from lora_kernels.impl.reference import embedding as reference
from lora_kernels.operands.call import Adapter, Wanted
from lora_kernels.operands.embedding import NO_PADDING, EmbeddingCall
from lora_kernels.operands.weight import Dense
from lora_kernels.registration import operators
from lora_kernels.testing import assert_within_budget
from tests.support.closeness import assert_close
from tests.support.draws import errors_of_draws
from tests.support.quantised import COMPILED

PLAIN = ("eager", "reference")
compiled_part = pytest.mark.skipif(not COMPILED, reason="needs the compiled CPU part")
IMPLS = (pytest.param("cpu", marks=compiled_part), *PLAIN)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMES = ("y", "da", "db")


def problem(shape=(3, 5), v=11, h=6, r=3, dtype=F64, adapter_dtype=None):
    """Return ids, W, A and B; the last two require grad."""
    adapter = adapter_dtype or dtype
    ids = torch.randint(0, v, shape)
    a = torch.randn(r, v).to(adapter).requires_grad_()
    b = (torch.randn(h, r) * r**-0.5).to(adapter).requires_grad_()
    return ids, torch.randn(v, h).to(dtype), a, b


def call_of(weight, a, b, scaling=1.0, padding_idx=NO_PADDING, embed_scale=None):
    scale = None if embed_scale is None else torch.tensor(embed_scale, dtype=weight.dtype)
    return EmbeddingCall(Dense(weight), Adapter(a, b, scaling), padding_idx, scale)


def results(ids, weight, a, b, dy, impl, **how):
    y = lk.lora_embedding(ids, weight, a, b, impl=impl, **how)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, (a, b), dy)), strict=True))


def oracle(ids, weight, a, b, dy, dtype=F64, **how):
    """Return the reference's own results, every tensor in a dtype."""
    call = call_of(*(t.detach().to(dtype) for t in (weight, a, b)), **how)
    grads = reference.backward(dy.to(dtype), ids, call, Wanted(False, True, True, False))
    return dict(zip(NAMES, (reference.forward(ids, call), *grads[1:3]), strict=True))


def assert_parity(case, impl, **how):
    ids, weight, a, b = case
    dy = torch.randn(*ids.shape, weight.shape[1]).to(weight.dtype)
    expected = oracle(*case, dy, **how)
    errors = None if weight.dtype == F64 else errors_of_draws(
        (*case, dy), ids.numel() * a.shape[0],
        lambda draw: oracle(*draw, weight.dtype, **how), lambda draw: oracle(*draw, **how),
    )  # fmt: skip
    for name, result in results(*case, dy, impl, **how).items():
        assert result.dtype == {"y": weight, "da": a, "db": b}[name].dtype
        if errors is None:
            torch.testing.assert_close(result, expected[name], rtol=1e-12, atol=1e-12)
        else:
            assert_within_budget(result, expected[name], errors[name], f"{name} of {impl}")


def served(impl, dtype):
    """Return the dtype, or where the compiled part doesn't compute in it, float32."""
    return F32 if impl == "cpu" and dtype not in (F32, BF16) else dtype


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("r", [1, 8, 64])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(F32, None), (BF16, None), (BF16, F32), (F16, F32), (F64, None)]
)
def test_parity(dtype, adapter_dtype, r, impl):
    if served(impl, dtype) is not dtype:
        dtype, adapter_dtype = F32, BF16 if adapter_dtype else F64
    assert_parity(problem((7, 61), 300, 40, r, dtype, adapter_dtype), impl)
    assert_parity(problem((333,), 5, 129, r, dtype, adapter_dtype), impl, embed_scale=6.5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 4)])
def test_ids_of_any_shape(shape, impl):
    ids, weight, a, b = problem(shape, dtype=served(impl, F64))
    dy = torch.randn(*shape, 6).to(weight.dtype)
    for kind in (torch.int32, torch.int64):
        found = results(ids.to(kind), weight, a, b, dy, impl, padding_idx=-3)
        expected = oracle(ids, weight, a, b, dy, padding_idx=8)
        assert found["y"].shape == (*shape, 6)
        torch.testing.assert_close(found, expected, check_dtype=False)
    apart = problem(v=9, dtype=served(impl, F64))[1:]
    assert_parity((torch.randint(0, 9, (4, 6)).t(), *apart), impl)
    assert_parity(
        (
            torch.randint(0, 9, (4, 6)),
            *(t.detach().t().contiguous().t().requires_grad_(t.requires_grad) for t in apart),
        ),
        impl,
    )


@pytest.mark.parametrize("impl", PLAIN)
def test_gradcheck(impl):
    ids, weight, a, b = problem()

    def f(weight, a, b):
        return lk.lora_embedding(ids, weight, a, b, scaling=1.7, embed_scale=3.0, impl=impl)

    leaves = (weight.requires_grad_(), a, b)
    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("embed_scale", [None, 8.0])
@pytest.mark.parametrize("padding_idx", [None, 4])
def test_peft_computes_the_same(padding_idx, embed_scale, impl):
    peft, dtype = pytest.importorskip("peft"), served(impl, F64)
    base = nn.Embedding(11, 6, padding_idx=padding_idx, dtype=dtype)
    if embed_scale is not None:
        scaled = type("Scaled", (nn.Embedding,), {})
        scaled.forward = lambda self, ids: nn.Embedding.forward(self, ids) * self.embed_scale
        base.__class__ = scaled
        base.embed_scale = torch.tensor(embed_scale, dtype=dtype)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, lora_dropout=0.9, target_modules=["0"], init_lora_weights=False
    )
    model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).to(dtype)
    layer, ids = model.base_model.model[0], torch.arange(22).reshape(2, 11) % 11
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    theirs, dy = model(ids), torch.randn(2, 11, 6, dtype=dtype)
    found = results(
        ids, base.weight.detach(), a, b, dy, impl,
        scaling=2.0, padding_idx=padding_idx, embed_scale=embed_scale,
    )  # fmt: skip
    expected = (theirs.detach(), *torch.autograd.grad(theirs, (a, b), dy))
    close = 1e-13 if dtype == F64 else 1e-5
    for result, other in zip(found.values(), expected, strict=True):
        assert_close(result, other, close)
    assert found["da"].any()
    assert padding_idx is None or not found["da"][:, padding_idx].any()


@pytest.mark.parametrize("impl", IMPLS[:2])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_two_runs_give_the_same_bits(dtype, impl):
    ids, weight, a, b = problem((4096,), 64, 48, 16, dtype, F32)
    dy, threads = torch.randn(4096, 48).to(dtype), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(results(ids, weight, a, b, dy, impl)["da"])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_only_ids_and_parameters_are_saved():
    ids, weight, a, b = problem((64, 33), 100, 32, 4, BF16, F32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lk.lora_embedding(ids, weight, a, b, embed_scale=2.0)
    owned = {t.data_ptr() for t in (ids, weight, a, b)}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in owned) <= 4  # embed_scale


@pytest.mark.parametrize("supported", [False, True])
def test_no_wide_tensor_of_all_rows_beside_float32_adapters(supported, monkeypatch):
    """Where a CPU has products in bfloat16 and, by blocks of rows, where it has none."""
    monkeypatch.setattr(eager, "_has_bfloat16_products", lambda: supported)
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 256 * 16)
    ids, weight, a, b = problem((400,), 20, 256, 4, BF16, F32)
    call, dy = call_of(weight, a.detach(), b.detach()), torch.randn(400, 256).bfloat16()
    largest = 0

    class Widest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == F32:
                largest = max(largest, out.numel())
            return out

    with Widest():
        eager.forward(ids, call)
        eager.backward(dy, ids, call, Wanted(False, True, True, False))
    assert 0 < largest <= (400 * 4 if supported else 256 * 16)


def test_blocks_of_rows_in_float32_compute_the_same(monkeypatch):
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 40 * 3)
    for supported in (False, True):
        monkeypatch.setattr(eager, "_has_bfloat16_products", lambda supported=supported: supported)
        assert_parity(problem((7, 11), 30, 40, 4, BF16, F32), "eager", padding_idx=3)


@pytest.mark.parametrize("scaling", [100.0, torch.tensor(100.0)], ids=["number", "tensor"])
def test_the_range_of_float16_is_that_of_its_results(scaling):
    """dy B · scaling leaves it, A times scaling too; dA and dB don't."""
    ids, weight, a, b = problem((50,), 400, 32, 4, F16, F32)
    a, b = (a.detach() * 1000).requires_grad_(), (b.detach() * 1e-4).requires_grad_()
    assert_parity((ids, weight, a, b), "eager", scaling=scaling)


def forgot_padding(dy, ids, call, wanted):
    return BACKWARD(dy, ids, call._replace(padding_idx=NO_PADDING), wanted)


def forgot_embed_scale(dy, ids, call, wanted):
    return BACKWARD(dy, ids, call._replace(embed_scale=None), wanted)


def overwrote_repeats(dy, ids, call, wanted):
    dx, da, db, dbias = BACKWARD(dy, ids, call, wanted)
    last = BACKWARD(dy[-1:], ids[-1:], call, wanted).da
    return dx, torch.where(last != 0, last, da), db, dbias


def scaled_rows_alone(ids, call):
    scale, adapter = call.embed_scale, call.adapter
    return FORWARD(ids, call._replace(adapter=adapter._replace(scaling=adapter.scaling / scale)))


FORWARD, BACKWARD = eager.forward, eager.backward


@pytest.mark.parametrize(
    "mutant", [forgot_padding, forgot_embed_scale, overwrote_repeats, scaled_rows_alone]
)
def test_mutants_are_caught(mutant, monkeypatch):
    case, how = problem((64,), 7, 16, 4, F32), {"padding_idx": 2, "embed_scale": 4.0}
    case[0][-1] = 0
    assert_parity(case, "eager", **how)
    name = "forward" if mutant is scaled_rows_alone else "backward"
    monkeypatch.setattr(eager, name, mutant)
    with pytest.raises(AssertionError, match="budget"):
        assert_parity(case, "eager", **how)


def plain(ids, weight, padding_idx=None):
    def f(a, b):
        xa = nn.functional.embedding(ids, a.mT, padding_idx)
        return nn.functional.embedding(ids, weight) + 1.7 * (xa @ b.mT)

    return f


def test_transforms_of_torch_func():
    ids, weight, a, b = problem()

    def ours(a, b):
        return lk.lora_embedding(ids, weight, a, b, scaling=1.7, padding_idx=2)

    theirs, a, b = plain(ids, weight, 2), a.detach(), b.detach()
    for of in (
        lambda f: grad(lambda a, b: f(a, b).square().sum(), (0, 1))(a, b),
        lambda f: jvp(f, (a, b), (b.sum() * a, -b)),
        lambda f: vmap(f, (None, 0))(a, torch.stack([b, -b])),
    ):
        torch.testing.assert_close(of(ours), of(theirs))
    with pytest.raises(ValueError, match="can't serve this call: inside torch"):
        grad(lambda a: lk.lora_embedding(ids, weight, a, b, impl="eager").sum())(a)


class Net(nn.Module):
    def __init__(self, weight, a, b):
        super().__init__()
        self.weight, self.a, self.b = weight, nn.Parameter(a.detach()), nn.Parameter(b.detach())

    def forward(self, ids):
        return lk.lora_embedding(ids, self.weight, self.a, self.b, scaling=1.7, embed_scale=2.0)


def compiled(net):
    torch._dynamo.reset()
    return torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    "capture",
    [
        compiled,
        lambda net: torch.export.export(net, (torch.zeros(3, 5, dtype=torch.int64),)).module(),
        lambda net: torch.jit.trace(net, (torch.zeros(3, 5, dtype=torch.int64),)),
        lambda net: torch.fx.experimental.proxy_tensor.make_fx(net)(
            torch.zeros(3, 5, dtype=torch.int64)
        ),
    ],
    ids=["compile", "export", "jit.trace", "make_fx"],
)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_captures_train(dtype, capture):
    ids, *parts = problem(dtype=dtype)
    net = Net(*parts)
    captured = capture(net)
    expected, found = net(ids), captured(ids)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    found.square().sum().backward()
    owners = [p for p in (*captured.parameters(), *net.parameters()) if p.grad is not None]
    for owner, wanted in zip(owners[:2], grads, strict=True):
        # Sums in another order, whose terms may cancel.
        error = 8 * torch.finfo(dtype).eps * wanted.abs().max().item()
        torch.testing.assert_close(owner.grad, wanted, rtol=0, atol=error)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("impl", IMPLS)
def test_operators_keep_torchs_rules(impl):
    ids, weight, a, b = problem(dtype=F32)
    forward, backward = operators("lora_embedding", impl)
    flat = (None, 1.7, 2, torch.tensor(3.0))
    torch.library.opcheck(forward, (ids, weight, a, b, *flat))
    dy = torch.randn(3, 5, 6)
    torch.library.opcheck(backward, (dy, ids, a.detach(), b.detach(), *flat, (True, False)))


@pytest.mark.parametrize("impl", IMPLS[:2])
def test_autocast_leaves_a_look_up_alone(impl):
    ids, weight, a, b = problem(dtype=F32)
    expected = lk.lora_embedding(ids, weight, a, b, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        y = lk.lora_embedding(ids, weight, a, b, impl=impl)
        recorded = operators("lora_embedding", impl).forward(ids, weight, a, b, None, 1.0, -1, None)
    assert torch.equal(y, expected)
    assert torch.equal(recorded, expected)


IDS, W = torch.tensor([[0, 3]]), torch.randn(4, 6)
GOOD = {"ids": IDS, "weight": W, "a": torch.randn(2, 4), "b": torch.randn(6, 2)}
BAD = {
    "ids a list": ({"ids": [1]}, TypeError, "ids: expected a torch.Tensor, got list"),
    "ids floats": ({"ids": IDS.float()}, TypeError, "ids: expected int32 or int64, got torch.flo"),
    "ids bytes": ({"ids": IDS.byte()}, TypeError, "ids: expected int32 or int64, got torch.uint8"),
    "integer W": ({"weight": W.int()}, TypeError, "weight: expected float16.*got torch.int32"),
    "W transposed": ({"weight": W.t()}, ValueError, r"weight: expected shape \[4, 6\] beside"),
    "W elsewhere": ({"weight": W.to("meta")}, ValueError, "weight: expected the device of ids"),
    "A transposed": ({"a": torch.randn(4, 2)}, ValueError, r"lora_embedding_A.*got \[4, 2\]"),
    "A 1-D": ({"a": torch.randn(4)}, ValueError, "lora_embedding_A: expected two dimensions"),
    "ranks differ": ({"b": torch.randn(6, 3)}, ValueError, "of one rank R"),
    "scaling": ({"scaling": float("nan")}, ValueError, "^scaling: expected a finite number"),
    "embed_scale": ({"embed_scale": float("inf")}, ValueError, "^embed_scale: expected a fin"),
    "padding_idx": ({"padding_idx": 4}, ValueError, "padding_idx: expected a row of 4, got 4"),
    "padding text": ({"padding_idx": "0"}, TypeError, "padding_idx: expected an int or None"),
    "below": ({"padding_idx": -5}, ValueError, "padding_idx: expected a row of 4, got -5"),
    "impl": (
        {"impl": "triton"},
        ValueError,
        "'triton' can't serve this call: has no lora_embedding",
    ),
    "unknown": ({"impl": "gpu"}, ValueError, "impl: expected one of"),
    "id too large": ({"ids": IDS + 1}, IndexError, "index out of range"),
    "id below 0": ({"ids": IDS - 1}, IndexError, "index out of range"),
}


@pytest.mark.parametrize(("wrong", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(wrong, error, message):
    given = {**GOOD, **wrong}
    ids, weight, a, b = (given.pop(name) for name in GOOD)
    with pytest.raises(error, match=message):
        lk.lora_embedding(ids, weight, a, b, **given)


def test_an_emptied_table_is_named():
    weight = W.clone()
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weight: expected memory"):
        lk.lora_embedding(IDS, weight, GOOD["a"], GOOD["b"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("change", [1, -1])
def test_an_id_outside_the_table_is_torchs_error(change, impl):
    with pytest.raises(IndexError, match="index out of range"):
        lk.lora_embedding(IDS + change, W, GOOD["a"], GOOD["b"], impl=impl)


@compiled_part
@pytest.mark.parametrize("change", [1, -1])
def test_the_compiled_part_looks_at_ids_itself(change):
    """Operators may be reached past Python's look: by graphs, for instance."""
    both, flat = operators("lora_embedding", "cpu"), (GOOD["a"], GOOD["b"], None, 1.0, -1, None)
    with pytest.raises(RuntimeError, match="ids: expected numbers from 0 to 3"):
        both.forward(IDS + change, W, *flat)
    with pytest.raises(RuntimeError, match="ids: expected numbers from 0 to 3"):
        both.backward(torch.ones(1, 2, 6), IDS + change, *flat, (True, True))
    with pytest.raises(RuntimeError, match="dy: expected float32 or bfloat16"):
        both.backward(torch.ones(1, 2, 6).double(), IDS, *flat, (True, True))

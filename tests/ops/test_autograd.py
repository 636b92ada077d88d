"""Gradients: gradcheck, what is saved, what is computed, checkpointing, autocast."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.impl.eager import linear as eager
from lora_kernels.impl.eager.products import left_operand
from lora_kernels.impl.reference import linear as reference
from lora_kernels.operands.call import Wanted
from lora_kernels.operands.dropout import drop_threshold
from tests.support.implementations import IMPLS, linear_call, skip_if_refused


def problem(m=6, n=9, k=13, r=4, dtype=torch.float32, adapter_dtype=None):
    """Return x, weight, lora_A, lora_B, bias; all but the weight require grad."""
    adapter = adapter_dtype or dtype
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    a, b = torch.randn(r, k).to(adapter), torch.randn(n, r).to(adapter)
    leaves = [t.requires_grad_() for t in (x, a, b, bias)]
    return leaves[0], torch.randn(n, k).to(dtype), *leaves[1:]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(impl, dropout_p):
    skip_if_refused(impl, torch.float64)
    x, w, a, b, bias = problem(dtype=torch.float64)

    def f(x, w, a, b, bias):
        return lk.lora_linear(
            x, w, a, b, bias, scaling=1.7, dropout_p=dropout_p, training=True, seed=5, impl=impl
        )

    assert gradcheck(f, (x, w.requires_grad_(), a, b, bias))


def test_explicit_backward_is_the_derivative_of_the_reference_forward():
    x, w, a, b, bias = problem(dtype=torch.float64)
    seed, threshold, dy = torch.tensor(9), drop_threshold(0.3), torch.randn(6, 9).double()
    call = linear_call(w, a, b, bias, seed, 1.7, threshold)
    y, xa = reference.forward(x, call)
    derived = torch.autograd.grad(y, (x, a, b, bias), dy)
    explicit = reference.backward(dy, x, xa, call, Wanted(*[True] * 4))
    for one, other in zip(derived, explicit, strict=True):
        torch.testing.assert_close(one, other)


class CountedOps(TorchDispatchMode):
    """Records name and largest float32 result of every ATen call."""

    def __init__(self):
        super().__init__()
        self.names, self.largest_fp32 = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            self.names.append(func.overloadpacket.__name__)
            for t in out if isinstance(out, tuple) else (out,):
                if isinstance(t, torch.Tensor) and t.dtype == torch.float32:
                    self.largest_fp32 = max(self.largest_fp32, t.numel())
        return out


@pytest.fixture
def counted(monkeypatch):
    """Count inside the eager bodies: a dispatch mode sees an operator from outside as one call."""
    mode = CountedOps()

    def inside(body):
        def run(*args):
            with mode:
                return body(*args)

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(eager, name, inside(getattr(eager, name)))
    return mode


def products(names):
    return sum(name in ("mm", "addmm", "addmm_", "linear") for name in names)


@pytest.mark.parametrize(
    ("wanted", "count"),
    [("xab", 5), ("ab", 3), ("x", 3), ("a", 2), ("b", 1)],
)
def test_gradients_not_asked_for_are_not_computed(wanted, count, counted):
    x, w, a, b, _ = problem()
    for name, t in (("x", x), ("a", a), ("b", b)):
        t.requires_grad_(name in wanted)
    y = lk.lora_linear(x, w, a, b, impl="eager")
    counted.names.clear()
    y.backward(torch.randn_like(y))
    assert products(counted.names) == count
    for name, t in (("x", x), ("a", a), ("b", b)):
        assert (t.grad is not None) == (name in wanted)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_float32_adapters_never_widen_x(dropout_p, counted):
    x, w, a, b, _ = problem(64, 48, 80, 4, torch.bfloat16, torch.float32)
    y = lk.lora_linear(x, w, a, b, dropout_p=dropout_p, training=True, impl="eager")
    y.backward(torch.randn_like(y))
    assert a.grad.dtype == b.grad.dtype == torch.float32
    assert 0 < counted.largest_fp32 < x.numel()


def saved_bytes(f, *known):
    """Bytes saved for backward by f, beyond the storages of the known tensors."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f()
    for t in known:
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values()), y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_saved_for_backward_is_at_most_two_percent_of_x(dtype, dropout_p):
    x, w, a, b, bias = problem(256, 64, 2048, 16, dtype)
    extra, _ = saved_bytes(
        lambda: lk.lora_linear(x, w, a, b, bias, dropout_p=dropout_p, training=True), x, w, a, b
    )
    assert 0 < extra <= 0.02 * x.numel() * x.element_size()


def test_x_is_not_saved_where_only_its_own_gradient_is_wanted():
    x, w, a, b, _ = problem()
    a.requires_grad_(False)
    b.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lk.lora_linear(x, w, a, b)
    assert {t.data_ptr() for t in saved} == {w.data_ptr(), a.data_ptr(), b.data_ptr()}


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_gives_the_same_and_writes_no_saved_tensor(impl):
    x, w, a, b, bias = problem(40, 24, 32)
    y = lk.lora_linear(x, w, a, b, bias, dropout_p=0.2, training=True, impl=impl)
    dy = torch.randn_like(y)
    before = [t.detach().clone() for t in (x, w, a, b, bias, dy)]
    first = torch.autograd.grad(y, (x, a, b, bias), dy, retain_graph=True)
    second = torch.autograd.grad(y, (x, a, b, bias), dy)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(t, old) for t, old in zip((x, w, a, b, bias, dy), before, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_redraws_the_same_mask(use_reentrant):
    x, w, a, b, bias = problem(40, 24, 32)

    def f(x):
        return lk.lora_linear(x, w, a, b, bias, dropout_p=0.5, training=True)

    torch.manual_seed(11)
    y = f(x)
    expected = torch.autograd.grad(y.square().sum(), (x, a, b))
    torch.manual_seed(11)
    again = checkpoint(f, x, use_reentrant=use_reentrant)
    assert torch.equal(again, y)
    again.square().sum().backward()
    for t, grad in zip((x, a, b), expected, strict=True):
        assert torch.equal(t.grad, grad)


def test_gradients_accumulate():
    x, w, a, b, bias = problem()
    lk.lora_linear(x, w, a, b, bias).sum().backward()
    once = a.grad.clone()
    lk.lora_linear(x, w, a, b, bias).sum().backward()
    torch.testing.assert_close(a.grad, 2 * once)


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_autocast_computes_in_its_dtype(backward_inside, dropout_p):
    x, w, a, b, bias = problem(40, 24, 32)
    kwargs = {"dropout_p": dropout_p, "training": True, "seed": 3}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lk.lora_linear(x, w, a, b, bias, **kwargs)
        if backward_inside:
            y.float().square().sum().backward()
    if not backward_inside:
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {t.grad.dtype for t in (x, a, b, bias)} == {torch.float32}
    x16, bias16 = x.detach().bfloat16().requires_grad_(), bias.detach().bfloat16()
    a2 = a.detach().requires_grad_()
    plain = lk.lora_linear(x16, w.bfloat16(), a2, b.detach(), bias16, **kwargs)
    assert torch.equal(plain, y)
    plain.float().square().sum().backward()
    assert torch.equal(a2.grad, a.grad)


def test_autocast_leaves_float64_alone():
    x, w, a, b, bias = problem(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lk.lora_linear(x, w, a, b, bias).dtype == torch.float64


@pytest.mark.parametrize(
    ("columns", "dtype", "copied"),
    [
        (136, torch.bfloat16, True),
        (128, torch.bfloat16, False),
        (200, torch.bfloat16, False),  # all of them: no gap
        (136, torch.float32, False),
    ],
)
def test_rows_are_copied_only_where_torch_may_read_beyond_them(columns, dtype, copied):
    """On a CPU with AMX; parity on tensors among NaN shows there that it must be so."""
    x = torch.zeros(20, 200, dtype=dtype)[:, :columns]
    rows = left_operand(x)
    assert torch.equal(rows, x)
    assert (rows.data_ptr() != x.data_ptr()) == copied

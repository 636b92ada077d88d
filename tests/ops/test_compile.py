"""torch.compile, torch.export, fake tensors and opcheck."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_kernels as lk
from lora_kernels.registration import operators
from tests.support.implementations import IMPLS, linear_call, skip_if_refused

pytestmark = pytest.mark.unpoisoned


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def tensors(m=10, n=24, k=40, r=5):
    x, w = torch.randn(2, m, k), torch.randn(n, k)
    a, b, bias = torch.randn(r, k), torch.randn(n, r), torch.randn(n)
    return [t.requires_grad_() if t is not w else t for t in (x, w, a, b, bias)]


def loss(x, w, a, b, bias, dropout_p=0.2, impl="auto"):
    y = lk.lora_linear(
        torch.relu(x), w, a, b, bias, scaling=1.5, dropout_p=dropout_p, training=True, impl=impl
    )
    return y.square().mean()


def gradients(f, args, **kwargs):
    torch.manual_seed(5)
    value = f(*args, **kwargs)
    return [value, *torch.autograd.grad(value, [t for t in args if t.requires_grad])]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_fullgraph_gives_the_gradients_of_eager(impl, dynamic):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for m in (10, 17):
        args = tensors(m)
        expected = gradients(loss, args, impl=impl)
        torch.testing.assert_close(gradients(compiled, args, impl=impl), expected)


def test_compiled_gradients_are_the_eager_ones():
    compiled = torch.compile(loss, fullgraph=True)
    args = tensors()
    # Inductor draws random numbers of its own, so the comparison is without dropout.
    expected = gradients(loss, args, dropout_p=0.0)
    torch.testing.assert_close(gradients(compiled, args, dropout_p=0.0), expected)
    with_dropout = gradients(compiled, args)
    assert all(torch.isfinite(t).all() for t in with_dropout)


def test_changing_batch_sizes_compile_at_most_twice():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for m in (10, 17, 23, 40, 5):
        compiled(*tensors(m)).backward()
    assert counter.frame_count <= 2


def _drawn(*shapes):
    return [torch.randn(shape, requires_grad=i > 0) for i, shape in enumerate(shapes)]


# Of each op a call of few numbers, as a function of scaling: W, which is frozen, comes first.
SCALED = {
    "linear": (lk.lora_linear, (5, 16), [(24, 16), (4, 16), (24, 4)], {}),
    "linear, float64": (lk.lora_linear, (5, 16), [(24, 16), (4, 16), (24, 4)], {}),
    "dora": (lk.lora_dora_linear, (5, 16), [(24, 16), (4, 16), (24, 4), (24,)], {}),
    "embedding": (lk.lora_embedding, None, [(20, 6), (4, 20), (6, 4)], {}),
    "conv": (lk.lora_conv2d, (2, 4, 6, 6), [(6, 4, 3, 3), (2, 4, 3, 3), (6, 2, 1, 1)], {}),
    "grouped": (
        lk.grouped_lora_linear, (5, 16), [(3, 24, 16), (3, 4, 16), (3, 24, 4)],
        {"offsets": torch.tensor([2, 2, 5], dtype=torch.int32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_a_schedule_of_scaling_is_compiled_twice(name):
    """As often as torch compiles what multiplies by a number of Python's."""
    op, x_shape, shapes, others = SCALED[name]
    dtype = torch.float64 if "float64" in name else torch.float32
    x = torch.randint(0, 20, (3, 4)) if x_shape is None else torch.randn(x_shape).to(dtype)
    tensors = [t.to(dtype).detach().requires_grad_(t.requires_grad) for t in _drawn(*shapes)]
    trained = [t for t in tensors if t.requires_grad]

    def loss_of(scaling):
        return op(x, *tensors, scaling=scaling, **others).square().mean()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    for scaling in (2.0, 3.0, 0.5, -1.0, 0.0):
        actual, expected = (
            [y, *torch.autograd.grad(y, trained)] for y in (compiled(scaling), loss_of(scaling))
        )
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 2
    with pytest.raises(Exception, match="scaling"):
        compiled(float("nan"))


def test_compiled_autocast():
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    args = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = gradients(loss, args), gradients(compiled, args)
    torch.testing.assert_close(actual, expected)


def test_export_of_a_layer():
    layer = lk.LoRALinear(40, 24, r=5, lora_dropout=0.1).eval()
    torch.nn.init.normal_(layer.lora_B.weight)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(layer, (torch.randn(3, 40),), dynamic_shapes=({0: batch},))
    for m in (3, 11):
        x = torch.randn(m, 40)
        torch.testing.assert_close(exported.module()(x), layer(x))


def test_fake_tensors_know_shapes_and_dtypes():
    with FakeTensorMode():
        x = torch.empty(3, 7, 40, dtype=torch.bfloat16, requires_grad=True)
        w = torch.empty(24, 40, dtype=torch.bfloat16)
        a, b = torch.empty(5, 40, requires_grad=True), torch.empty(24, 5, requires_grad=True)
        y = lk.lora_linear(x, w, a, b, dropout_p=0.1, training=True)
        assert (y.shape, y.dtype) == ((3, 7, 24), torch.bfloat16)
        y.sum().backward()
        assert (a.grad.shape, a.grad.dtype) == (a.shape, torch.float32)
        assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", [(True,) * 4, (False, True, False, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_opcheck(impl, needs, dtype):
    skip_if_refused(impl, dtype)
    x, w, a, b, bias = (t.detach() for t in tensors())
    x, w, bias = (t.to(dtype) for t in (x, w, bias))
    seed = torch.tensor(3)
    call, both = linear_call(w, a, b, bias, seed, 1.5, 6554), operators("lora_linear", impl)
    torch.library.opcheck(both.forward, (x, *call.flat()))
    y, xa = both.forward(x, *call.flat())
    torch.library.opcheck(both.backward, (torch.randn_like(y), x, xa, *call.flat_backward(), needs))

"""Every implementation against the float64 reference: values and gradients, within the budget."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.registration import operators
from lora_kernels.testing import (
    Case,
    assert_parity,
    beyond_float16_cases,
    float16_range_cases,
    make_inputs,
)
from tests.support.implementations import IMPLS, linear_call, needs_gpu, skip_if_refused
from tests.support.layouts import LAYOUTS, laid_out

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
RANKS = (1, 5, 8, 16, 24, 96, 256)
SIZES = (((1,), 7, 129), ((7,), 736, 1), ((129,), 129, 736), ((736,), 1, 7), ((300,), 136, 200))

pytestmark = pytest.mark.parametrize("impl", IMPLS)


@pytest.fixture(autouse=True, params=["host", pytest.param("gpu", marks=needs_gpu)])
def _memory(request, impl):
    """Make the device the default one: every tensor of a test lies there."""
    memory = {"host": "cpu", "gpu": "cuda"}[request.param]
    skip_if_refused(impl, request.node.callspec.params.get("dtype", FP32), device=memory)
    with torch.device(memory):
        yield


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("r", RANKS, ids="r{}".format)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_sizes_and_ranks(impl, dtype, r, dropout_p):
    for leading, n, k in SIZES:
        case = Case(leading, n, k, r, dtype, dropout_p=dropout_p)
        assert_parity(case, make_inputs(case), impl)


@pytest.mark.parametrize("leading", [(), (5,), (3, 7), (2, 1, 9), (4, 0)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_leading_dimensions(impl, leading, bias):
    case = Case(leading, 40, 24, 5, dropout_p=0.3, bias=bias)
    assert_parity(case, make_inputs(case), impl)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [FP32, torch.float64], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.05], ids="p{}".format)
def test_wider_adapters(impl, dtype, adapter_dtype, dropout_p):
    case = Case((3, 50), 136, 200, 8, dtype, adapter_dtype, dropout_p)
    assert_parity(case, make_inputs(case), impl)


def test_16_bit_adapters_beside_a_float32_base(impl):
    case = Case((65,), 48, 72, 8, FP32, BF16, 0.05)
    assert_parity(case, make_inputs(case), impl)


@pytest.mark.parametrize("leading", [(3,), (2, 65)], ids=str)
@pytest.mark.parametrize("index", range(len(float16_range_cases((), 1, 1, 1))))
def test_float16_range(impl, leading, index):
    skip_if_refused(impl, FP16)
    case = float16_range_cases(leading, 72, 136, 5)[index]
    assert_parity(case, make_inputs(case), impl)


@pytest.mark.parametrize("leading", [(3,), (2, 65)], ids=str)
@pytest.mark.parametrize("index", range(len(beyond_float16_cases((), 1, 1, 1))))
def test_wider_adapters_keep_their_range_beside_float16(impl, leading, index):
    """On CPUs, which "eager" serves; kernels of GPUs round them to float16."""
    skip_if_refused(impl, FP16)
    case = beyond_float16_cases(leading, 72, 136, 5)[index]
    inputs = make_inputs(case)
    assert_parity(case, inputs, impl)
    wide = (inputs.lora_A, inputs.lora_B, inputs.x.float() @ inputs.lora_A.T)
    assert max(t.abs().max() for t in wide) > 65504


@pytest.mark.parametrize("shape", [(512, 2048, 2048), (2048, 768, 768), (17, 1024, 1100)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_sizes_of_real_layers(impl, shape, dtype):
    m, n, k = shape
    if dtype == BF16 and torch.backends.cpu.get_cpu_capability() != "AVX512":
        m = max(17, m // 16)  # torch's own products of bfloat16 would take minutes
    case = Case((m,), n, k, 16, dtype, dropout_p=0.05)
    assert_parity(case, make_inputs(case), impl)


def test_two_threads(impl):
    case = Case((1024,), 768, 256, 16, BF16, dropout_p=0.05)
    torch.set_num_threads(2)
    try:
        assert_parity(case, make_inputs(case), impl)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
def test_strided_tensors(impl, layout, dtype, dropout_p):
    case = Case((4, 33), 72, 129, 5, dtype, dropout_p=dropout_p)
    assert_parity(case, laid_out(make_inputs(case), layout), impl)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
def test_gradient_of_a_sum_is_an_expanded_tensor(impl, dropout_p):
    case = Case((6, 20), 48, 40, 8, BF16, dropout_p=dropout_p)
    inputs = make_inputs(case)
    inputs.dy = torch.ones((), dtype=BF16).expand(6, 20, 48)
    assert_parity(case, inputs, impl)


def test_tensor_scaling_equals_the_number(impl):
    case = Case((9,), 16, 24, 4, scaling=torch.tensor(1.7))
    inputs = make_inputs(case)
    assert_parity(case, inputs, impl)
    number = Case((9,), 16, 24, 4, scaling=1.7)
    assert_parity(number, inputs, impl)


def test_nan_and_infinity_where_dropped_stay_out_of_the_adapter_branch(impl):
    x = torch.randn(40, 64)
    keep = lk.dropout_mask(x.shape, 0.5, seed=11)
    x[~keep] = float("inf")
    zero = torch.zeros(32, 64)
    a, b = torch.randn(4, 64), torch.randn(32, 4)
    # y itself holds the base product's inf · 0 = NaN, so look at the adapter branch alone.
    seed, threshold = torch.tensor(11), 32768
    call = linear_call(zero, a, b, None, seed, 1.0, threshold)
    _, xa = operators("lora_linear", impl).forward(x, *call.flat())
    assert torch.isfinite(xa).all()


def test_empty_batch_gives_zero_gradients(impl):
    x = torch.randn(0, 24, requires_grad=True)
    w, a, b = torch.randn(16, 24), torch.randn(4, 24).requires_grad_(), torch.randn(16, 4)
    b.requires_grad_()
    y = lk.lora_linear(x, w, a, b, dropout_p=0.1, training=True, impl=impl)
    assert y.shape == (0, 16)
    y.sum().backward()
    assert x.grad.shape == (0, 24)
    assert not a.grad.any()
    assert not b.grad.any()


def test_unfrozen_base_weight_gets_its_gradient(impl):
    x, w = torch.randn(3, 5, 24), torch.randn(16, 24, requires_grad=True)
    a, b, dy = torch.randn(4, 24), torch.randn(16, 4), torch.randn(3, 5, 16)
    lk.lora_linear(x, w, a, b, impl=impl).backward(dy)
    expected = torch.einsum("bmn,bmk->nk", dy, x)
    torch.testing.assert_close(w.grad, expected)


@pytest.mark.parametrize("leading", [(3,), (2048,)], ids=str)
def test_strided_bias(impl, leading):
    case = Case(leading, 32, 32, 4)
    inputs = make_inputs(case)
    inputs.bias = torch.stack([inputs.bias, inputs.bias + 1], -1)[..., 0]
    assert_parity(case, inputs, impl)

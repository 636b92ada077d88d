"""Every op against the float64 reference, within the budget: by each implementation, with each
format of W that it reads, on the CPU, in a virtual machine or interpreter, or on a GPU.

One list of cases, each op's `Spec`. A GPU's kernels take shares of it, weak memory for a third;
what one implementation alone has is in tests/impl. Inputs are drawn anew; outputs start as NaN.
"""

from dataclasses import replace

import pytest
import torch

import lora_kernels as lk
from lora_kernels.registration import operators
from lora_kernels.testing import LINEAR, SPECS, Case
from lora_kernels.testing.linear import BF16, FP32
from tests.support.implementations import linear_call
from tests.support.layouts import LAYOUTS, laid_out
from tests.support.targets import HOSTS, TARGETS, elsewhere, pairs

pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # of the interpreter
targets = pytest.mark.parametrize("target", TARGETS)
hosts = pytest.mark.parametrize("target", HOSTS)


def check(spec, target, case, number=0, change=lambda inputs: inputs, wanted=None):
    """Check a case on a target; `change` makes other tensors of its inputs."""
    with target.running(number):
        target.skip_if_refused(spec, case)
        inputs = change(spec.inputs(case, target.memory))
        if wanted is None:
            spec.assert_parity(case, inputs, target.impl, target.form)
        else:
            actual = spec.call(case, inputs, target.impl, wanted, target.form)
            assert actual.keys() == {"y", *wanted}
            spec.assert_results(case, inputs, actual, target.impl)


@pytest.mark.parametrize(("spec", "target", "case", "number"), pairs(SPECS))
def test_cases(spec, target, case, number):
    check(spec, target, case, number)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "k"), [(FP32, 129), (BF16, 136)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
@targets
def test_strided_tensors(target, layout, dtype, k, dropout_p):
    case = Case((4, 33), 72, k, 5, target.dtype(dtype), dropout_p=dropout_p)
    number = LAYOUTS.index(layout) + (dtype == BF16) + (dropout_p > 0)
    check(LINEAR, target, case, number, change=lambda inputs: laid_out(inputs, layout))


WANTED = [("dx",), ("da",), ("db",), ("dbias",), ("da", "db"), ("dx", "dbias")]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
@targets
def test_only_the_gradients_asked_for(target, wanted, dropout_p):
    case = Case((70,), 72, 136, 8, target.dtype(BF16), dropout_p=dropout_p)
    check(LINEAR, target, case, WANTED.index(wanted) + (dropout_p > 0), wanted=wanted)


def _expanded_gradient(inputs):
    return replace(inputs, dy=inputs.x.new_ones(()).expand(inputs.dy.shape))


def _overlapping_rows(inputs):
    """Rows that overlap, or are all one: no descriptor describes them."""
    m, k = inputs.x.shape
    x = inputs.x.flatten()[: (m - 1) * 8 + k].as_strided((m, k), (8, 1))
    return replace(inputs, x=x, dy=inputs.dy[:1].expand(inputs.dy.shape))


def _strided_bias(inputs):
    return replace(inputs, bias=torch.stack([inputs.bias, inputs.bias + 1], -1)[..., 0])


# A size, dropout and what is done to the tensors.
OTHER_TENSORS = {
    "gradient of a sum": (((6, 20), 48, 40, 8), 0.0, _expanded_gradient),
    "gradient of a sum, dropout": (((6, 20), 48, 40, 8), 0.1, _expanded_gradient),
    "overlapping rows": (((33,), 48, 64, 8), 0.0, _overlapping_rows),
    "strided bias, few rows": (((3,), 32, 32, 4), 0.0, _strided_bias),
    "strided bias": (((300,), 32, 32, 4), 0.0, _strided_bias),
    **{
        "x".join(map(str, sizes)): (((sizes[0],), *sizes[1:]), 0.1, lambda inputs: inputs)
        for sizes in (
            (1, 1, 1, 1), (3, 1, 7, 1), (2, 129, 3, 2), (0, 8, 8, 2), (5, 8, 736, 3), (736, 1, 7, 1)
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_TENSORS)
@targets
def test_other_tensors(target, name):
    """Laid out as others than a layout does, and sizes below a vector."""
    sizes, dropout_p, change = OTHER_TENSORS[name]
    case = Case(*sizes, target.dtype(BF16), dropout_p=dropout_p)
    check(LINEAR, target, case, list(OTHER_TENSORS).index(name), change=change)


@targets
def test_tensor_scaling_equals_the_number(target):
    case = Case((9,), 16, 24, 4, target.dtype(BF16))
    in_memory = replace(case, scaling=torch.tensor(case.scaling, device=target.memory))
    for number, each in enumerate((in_memory, case, in_memory)):
        with target.running(number):
            target.skip_if_refused(LINEAR, case)
            inputs = LINEAR.inputs(case, target.memory)
            LINEAR.assert_parity(each, inputs, target.impl, target.form)


@pytest.mark.many
@hosts
def test_two_threads(target):
    case = Case((1024,), 768, 256, 16, BF16, dropout_p=0.05)
    torch.set_num_threads(2)
    try:
        check(LINEAR, target, case)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("leading", [(3,), (2, 65)], ids=str)
@elsewhere
def test_some_cases_leave_the_range_of_float16(leading):
    for case in LINEAR.cases()["beyond float16"]:
        inputs = LINEAR.inputs(case)
        wide = (inputs.lora_A, inputs.lora_B, inputs.x.float() @ inputs.lora_A.T)
        assert max(t.abs().max() for t in wide) > 65504


@hosts
def test_nan_and_infinity_where_dropped_stay_out_of_the_adapter_branch(target):
    with target.running(0):
        target.skip_if_refused(LINEAR, Case((40,), 32, 64, 4))
        x = torch.randn(40, 64)
        keep = lk.dropout_mask(x.shape, 0.5, seed=11, device=x.device)
        x[~keep] = float("inf")
        zero = torch.zeros(32, 64)
        a, b = torch.randn(4, 64), torch.randn(32, 4)
        # y itself holds the base product's inf · 0 = NaN, so look at the adapter branch alone.
        seed, threshold = torch.tensor(11), 32768
        call = linear_call(zero, a, b, None, seed, 1.0, threshold)
        _, xa = operators("lora_linear", target.impl).forward(x, *call.flat())
        assert torch.isfinite(xa).all()


@hosts
def test_empty_batch_gives_zero_gradients(target):
    with target.running(0):
        target.skip_if_refused(LINEAR, Case((0,), 16, 24, 4))
        x = torch.randn(0, 24, requires_grad=True)
        w, a, b = torch.randn(16, 24), torch.randn(4, 24).requires_grad_(), torch.randn(16, 4)
        b.requires_grad_()
        y = lk.lora_linear(x, w, a, b, dropout_p=0.1, training=True, impl=target.impl)
        assert y.shape == (0, 16)
        y.sum().backward()
        assert x.grad.shape == (0, 24)
        assert not a.grad.any()
        assert not b.grad.any()


@hosts
def test_unfrozen_base_weight_gets_its_gradient(target):
    with target.running(0):
        target.skip_if_refused(LINEAR, Case((3, 5), 16, 24, 4))
        x, w = torch.randn(3, 5, 24), torch.randn(16, 24, requires_grad=True)
        a, b, dy = torch.randn(4, 24), torch.randn(16, 4), torch.randn(3, 5, 16)
        lk.lora_linear(x, w, a, b, impl=target.impl).backward(dy)
        torch.testing.assert_close(w.grad, torch.einsum("bmn,bmk->nk", dy, x))

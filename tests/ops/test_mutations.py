"""The parity check itself: implementations broken on purpose must not pass it."""

import pytest
import torch

from lora_kernels.impl.eager import linear as eager
from lora_kernels.testing import Case, assert_parity, make_inputs

CASE = Case((65,), 48, 40, 40, dropout_p=0.2)  # r = k, so that a transposed A has A's shape
FORWARD, BACKWARD = eager.forward, eager.backward


def rescaled(call, factor):
    return call._replace(adapter=call.adapter._replace(scaling=factor))


def scale_dropped(x, call):
    return FORWARD(x, rescaled(call, 1.0))


def transposed_a(x, call):
    return FORWARD(x, call._replace(adapter=call.adapter._replace(a=call.adapter.a.t())))


def bias_dropped(x, call):
    return FORWARD(x, call._replace(bias=None))


def keep_scale_forgotten(x, call):
    return FORWARD(x, rescaled(call, call.adapter.scaling / call.dropout.scale))


def row_not_written(x, call):
    y, xa = FORWARD(x, call)
    y[-1] = torch.empty(y.shape[1:])
    return y, xa


def mask_not_reused(dy, x, xa, call, wanted):
    other = call.dropout._replace(seed=call.dropout.seed + 1)
    return BACKWARD(dy, x, xa, call._replace(dropout=other), wanted)


def mask_forgotten(dy, x, xa, call, wanted):
    return BACKWARD(dy, x, xa, call._replace(dropout=None), wanted)


def scale_dropped_in_backward(dy, x, xa, call, wanted):
    return BACKWARD(dy, x, xa, rescaled(call, 1.0), wanted)


def db_of_another_xa(dy, x, xa, call, wanted):
    return BACKWARD(dy, x, xa.roll(1, 0), call, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("forward", scale_dropped),
        ("forward", transposed_a),
        ("forward", bias_dropped),
        ("forward", keep_scale_forgotten),
        ("forward", row_not_written),
        ("backward", mask_not_reused),
        ("backward", mask_forgotten),
        ("backward", scale_dropped_in_backward),
        ("backward", db_of_another_xa),
    ],
)
def test_mutants_are_caught(name, mutant, dtype, monkeypatch):
    case = Case(**(vars(CASE) | {"dtype": dtype}))
    inputs = make_inputs(case)
    assert_parity(case, inputs, "eager")
    monkeypatch.setattr(eager, name, mutant)
    with pytest.raises(AssertionError, match=r"budget|NaN"):
        assert_parity(case, inputs, "eager")

"""The parity check itself: implementations broken on purpose must not pass it."""

import pytest
import torch

from lora_kernels.impl.eager import linear as eager
from lora_kernels.testing import Case, assert_parity, make_inputs

CASE = Case((65,), 48, 40, 40, dropout_p=0.2)  # r = k, so that a transposed A has A's shape
FORWARD, BACKWARD = eager.lora_linear_forward, eager.lora_linear_backward


def scale_dropped(x, w, a, b, bias, seed, scaling, threshold):
    return FORWARD(x, w, a, b, bias, seed, 1.0, threshold)


def transposed_a(x, w, a, b, bias, seed, scaling, threshold):
    return FORWARD(x, w, a.t(), b, bias, seed, scaling, threshold)


def bias_dropped(x, w, a, b, bias, seed, scaling, threshold):
    return FORWARD(x, w, a, b, None, seed, scaling, threshold)


def keep_scale_forgotten(x, w, a, b, bias, seed, scaling, threshold):
    y, xa = FORWARD(x, w, a, b, bias, seed, scaling * (65536 - threshold) / 65536, threshold)
    return y, xa


def row_not_written(x, w, a, b, bias, seed, scaling, threshold):
    y, xa = FORWARD(x, w, a, b, bias, seed, scaling, threshold)
    y[-1] = torch.empty(y.shape[1:])
    return y, xa


def mask_not_reused(dy, x, xa, w, a, b, seed, scaling, threshold, needs):
    return BACKWARD(dy, x, xa, w, a, b, seed + 1, scaling, threshold, needs)


def mask_forgotten(dy, x, xa, w, a, b, seed, scaling, threshold, needs):
    return BACKWARD(dy, x, xa, w, a, b, None, scaling, 0, needs)


def scale_dropped_in_backward(dy, x, xa, w, a, b, seed, scaling, threshold, needs):
    return BACKWARD(dy, x, xa, w, a, b, seed, 1.0, threshold, needs)


def db_of_another_xa(dy, x, xa, w, a, b, seed, scaling, threshold, needs):
    return BACKWARD(dy, x, xa.roll(1, 0), w, a, b, seed, scaling, threshold, needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("lora_linear_forward", scale_dropped),
        ("lora_linear_forward", transposed_a),
        ("lora_linear_forward", bias_dropped),
        ("lora_linear_forward", keep_scale_forgotten),
        ("lora_linear_forward", row_not_written),
        ("lora_linear_backward", mask_not_reused),
        ("lora_linear_backward", mask_forgotten),
        ("lora_linear_backward", scale_dropped_in_backward),
        ("lora_linear_backward", db_of_another_xa),
    ],
)
def test_mutants_are_caught(name, mutant, dtype, monkeypatch):
    case = Case(**(vars(CASE) | {"dtype": dtype}))
    inputs = make_inputs(case)
    assert_parity(case, inputs, "eager")
    monkeypatch.setattr(eager, name, mutant)
    with pytest.raises(AssertionError, match=r"budget|NaN"):
        assert_parity(case, inputs, "eager")

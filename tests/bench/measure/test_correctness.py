"""Who may be timed: what is wrong is found, what is right passes."""

from dataclasses import replace

import pytest

from bench.measure.correctness import RIGHT, WRONG, verdicts
from bench.providers.registry import BY_NAME
from bench.providers.rivals import addmm_lora
from tests.support.bench import SMALL, scaled_y, wrong


def _wrong_gradient(x, weight, a, b, scaling, p):
    y = addmm_lora(x, weight, a, b, scaling, p)
    a.register_hook(lambda grad: grad * 1.01)
    return y


def _raising(x, weight, a, b, scaling, p):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("function", "named"),
    [(scaled_y, "y"), (_wrong_gradient, "da"), (_raising, "no such kernel")],
)
def test_gate_finds_what_is_wrong(function, named):
    found = verdicts(SMALL, [wrong("wrong", function)], "cpu")
    state, reason = found["wrong"]
    assert state == WRONG
    assert named in reason


@pytest.mark.parametrize("name", ["base", "peft", "peft16", "addmm", "eager", "cpu", "packed"])
@pytest.mark.parametrize("dtypes", [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_gate_passes_every_provider(name, dtypes):
    case = replace(SMALL, dtype=dtypes[0], adapters=dtypes[1])
    if (reason := BY_NAME[name].absence("cpu") or BY_NAME[name].refuse(case)) is not None:
        pytest.skip(reason)
    assert verdicts(case, [BY_NAME[name]], "cpu")[name] == (RIGHT, "")

"""Layers over bitsandbytes' weights: what is compared is one W, and PEFT over bitsandbytes."""

from dataclasses import replace

import pytest
import torch

from bench import shapes
from bench.measure.correctness import REFUSED, RIGHT, Gate, verdicts
from bench.providers.calls import Call
from bench.providers.registry import BY_NAME
from bench.shapes import Grid, cases
from bench.suites import memory, step
from lora_kernels.native import absence
from tests.support.bench import SMALL

pytest.importorskip("bitsandbytes")
OURS = "cpu-codes"
WHO = ("base", "peft", "addmm", "bitsandbytes", *([] if absence("cpu") else [OURS]))


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_all_compute_with_what_the_codes_decode_to(base):
    torch.manual_seed(0)
    case = replace(SMALL, base=base, n=128)
    states = verdicts(case, [BY_NAME[name] for name in WHO], "cpu")
    assert {state for state, _ in states.values()} == {RIGHT}, states
    inputs = case.inputs("cpu")
    call = Call(BY_NAME["bitsandbytes"], case, inputs, 0.0)
    assert type(call.layer.base_layer).__module__.startswith("bitsandbytes.")
    assert call.layer.base_layer is inputs.layer
    dense = Call(BY_NAME["peft"], case, inputs, 0.0)
    assert dense.layer.base_layer.weight.data_ptr() == inputs.weight.data_ptr()
    assert case.reference == "bitsandbytes"
    assert str(case).endswith(f"W in {base}")


def test_a_weight_other_than_the_codes_is_wrong():
    torch.manual_seed(0)
    gate = Gate(replace(SMALL, base="nf4"), "cpu")
    gate.inputs.weight[3] *= 1.1
    assert gate.fault(BY_NAME["peft"]) is None
    assert "y" in gate.fault(BY_NAME["bitsandbytes"])


def test_who_takes_codes_refuses_a_dense_weight():
    states = verdicts(SMALL, [BY_NAME[name] for name in WHO[3:]], "cpu")
    assert {state for state, _ in states.values()} == {REFUSED}
    assert SMALL.reference == "peft"


def test_limits_are_those_of_bfloat16():
    found = cases([shapes.QLORA], Grid(tokens=[1], dtypes=["bf16", "fp32"]))
    assert len(found) == 24
    assert all(bool(case.limits) == (case.dtype == "bf16") for case in found)
    codes, dense = (shapes.floor_bytes(replace(found[0], base=base)) for base in ("nf4", "dense"))
    assert dense - codes == pytest.approx(2 * (2 - 0.516) * 2048**2, abs=2)


def test_steps_of_a_quantised_model_are_one_computation():
    (case,) = step.qlora_cases(step.SMALLEST, ["fp32"], [0.0])
    losses = {name: step.first_loss(case, BY_NAME[name], "cpu") for name in WHO[1:]}
    assert losses == pytest.approx(dict.fromkeys(losses, losses[case.reference]), rel=1e-6)
    dense = step.first_loss(replace(case, base="dense"), BY_NAME["peft"], "cpu")
    assert dense != pytest.approx(losses["peft"], rel=1e-6)
    model = step.build_model(case, BY_NAME["bitsandbytes"], "cpu")
    kinds = {type(m) for m in model.modules() if type(m).__name__ == "Linear4bit"}
    assert {kind.__module__.partition(".")[0] for kind in kinds} == {"bitsandbytes", "peft"}
    assert str(case).endswith("W in nf4")


def test_memory_of_a_layer_of_codes_is_that_of_the_layer_itself():
    (group,) = memory.groups([shapes.QLORA], Grid(tokens=[1], dropouts=[0.05], dtypes=["fp32"]))
    case = replace(group.case, m=64, n=128, k=256)
    ours = [] if absence("cpu") else ["cpu", OURS]
    saved = {
        name: memory.of_group(memory.Group(case, (128,)), name, "cpu")[0]
        for name in ("bitsandbytes", *ours)
    }
    assert saved["bitsandbytes"] > 2 * 64 * 256 * 4  # x after dropout, and its mask
    if ours:  # beyond xa the scales' codes, which are no parameters
        assert saved["cpu"] < saved[OURS] < 64 * 256 * 4

"""Norms of DoRA's rows that a layer keeps for calls without gradients are never stale."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels import norms


def make(dtype=torch.float32, **settings):
    layer = lk.LoRALinear(13, 9, r=4, lora_alpha=6, use_dora=True, dtype=dtype, **settings)
    nn.init.normal_(layer.lora_B.weight)
    with torch.no_grad():
        layer.lora_magnitude_vector.weight.mul_(torch.linspace(-0.5, 1.5, 9))
    return layer


@pytest.fixture
def formed(monkeypatch):
    """Counts how often norms are formed for a layer to keep."""
    calls, real = [], norms.row_norms
    monkeypatch.setattr(norms, "row_norms", lambda call: calls.append(1) or real(call))
    return calls


def anew(layer, x):
    """What a layer that keeps nothing yet computes, by a call that could be differentiated."""
    with torch.enable_grad():
        return copy.deepcopy(layer)(x).detach()


def assert_close(y, expected):
    """Within a rounding of 16 bits: the product may be another implementation's."""
    tolerance = 1e-2 if y.dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def assert_right(layer, x):
    with torch.no_grad():
        torch.testing.assert_close(layer(x), anew(layer, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"base_bias": False}, {"impl": "eager"}], ids=str)
def test_results_are_those_of_a_call_that_forms_them(dtype, settings, formed):
    layer, x = make(dtype, **settings), torch.randn(2, 3, 13).to(dtype)
    expected = layer(x).detach()
    assert not formed
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                assert_close(layer(x), expected)
            assert layer(x[:, :0]).shape == (2, 0, 9)
    assert len(formed) == 1
    layer(x).sum().backward()  # what inference mode kept is not saved


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast(dtype, formed):
    layer, x = make(), torch.randn(5, 13)
    with torch.autocast("cpu", dtype):
        expected = layer(x).detach()
        with torch.no_grad():
            for _ in range(2):
                assert_close(layer(x), expected)
                assert layer(x).dtype == dtype
    before = 1 if dtype == torch.bfloat16 else 0  # float16's branch is float32
    assert len(formed) == before
    assert_right(layer, x)  # of the float32 weight again
    assert len(formed) == before + 1


def step_of(fused):
    def change(layer):
        parameters = [p for p in layer.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.5, fused=fused)
        layer(torch.ones(1, 13)).sum().backward()
        with torch.no_grad():
            layer(torch.ones(1, 13))  # kept between backward and the step
        versions = [p._version for p in parameters]
        optimizer.step()
        if fused:
            assert [p._version for p in parameters] == versions

    return change


CHANGES = {
    "AdamW, fused": step_of(True),
    "AdamW": step_of(False),
    "A by .data": lambda layer: layer.lora_A.weight.data.mul_(3.0),
    "B by .data": lambda layer: layer.lora_B.weight.data[4].zero_(),
    "other memory": lambda layer: setattr(layer.lora_A.weight, "data", torch.randn(4, 13)),
    "W in place": lambda layer: layer.base_layer.weight.detach().mul_(2.0),
    "W by .data": lambda layer: layer.base_layer.weight.data.mul_(2.0),
    "another BA by .data": lambda layer: layer.base_layer.weight.data.add_(torch.ones(9, 1) * 0.3),
    "a row of W by .data": lambda layer: layer.base_layer.weight.data[4].zero_(),
    "columns of W by .data": lambda layer: layer.base_layer.weight.data[:, 7:].zero_(),
    "alpha": lambda layer: setattr(layer, "lora_alpha", 30),
    "magnitude by .data": lambda layer: layer.lora_magnitude_vector.weight.data.add_(1.0),
    "load": lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
    "merged and not": lambda layer: layer.merge() or layer.unmerge(),
    "modes": lambda layer: layer.eval().train(),
    "a trained W": lambda layer: [layer.base_layer.requires_grad_(), step_of(True)(layer)],
    "dtype": lambda layer: layer.lora_A.to(torch.bfloat16) and layer.lora_B.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_makes_them_stale(change):
    layer, x = make(), torch.randn(5, 13)
    assert_right(layer, x)
    change(layer)
    assert_right(layer, x)


def test_calls_with_dropout_or_gradients_and_other_implementations_form_them(formed):
    layer, x = make(lora_dropout=0.5), torch.randn(5, 13)
    layer(x)
    with torch.no_grad():
        layer(x)
        assert not formed
        layer.eval()(x)
        assert len(formed) == 1
        make(impl="reference")(x)
    assert len(formed) == 1


def test_copies_and_pickles_start_without():
    layer, x = make(), torch.randn(5, 13)
    assert_right(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.__dict__["_lora_kernels_norms"] is None
        assert_right(other, x)


def test_patched_peft_layers(formed):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(13, 9)), config).eval()
    x = torch.randn(5, 13)
    with torch.no_grad():
        expected = model(x)
        lk.patch_peft(model)
        for _ in range(2):
            torch.testing.assert_close(model(x), expected)
        assert len(formed) == 1
        model.base_model.model[0].set_scale("default", 3.0)
        y = model(x)
        assert lk.report(model).layers["base_model.model.0"].fused == 3
        lk.unpatch_peft(model)
        torch.testing.assert_close(model(x), y)
    assert "_lora_kernels_norms" not in vars(model.base_model.model[0])

"""Several active adapters of one layer: PEFT's sum in one fused call."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from tests.support.closeness import assert_close

peft = pytest.importorskip("peft")

RANKS = {"default": 4, "second": 3, "third": 1}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


def make(
    dtype=torch.float32, adapters=torch.float32, alphas=(6, 6, 6), p=0.0, bias=True, names=RANKS
):
    """A PEFT model of one layer with adapters that are all active, and the same one patched."""
    model = nn.Sequential(nn.Linear(24, 40, bias=bias, dtype=dtype))
    for alpha, name in zip(alphas, names, strict=False):
        rank = RANKS[name]
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha * rank, lora_dropout=p, target_modules=["0"]
        )
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config)
    model.base_model.set_adapter(list(names))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
            parameter.data = parameter.data.to(adapters)
    ours = copy.deepcopy(model)
    lk.patch_peft(ours)
    return model, ours


def layer(model):
    return model.base_model.model[0]


def fused_calls(model):
    return next(iter(lk.report(model).layers.values())).fused


def results(model, x):
    """The output and gradients of a step; the generator is the same for both models."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    (y.float() if y.dtype.itemsize == 2 else y).square().sum().backward()
    named = {n: t.grad for n, t in model.named_parameters() if t.grad is not None}
    return {"y": y.detach(), "x": x.grad, **named}


def assert_alike(theirs, ours, x, fused=1):
    before = fused_calls(ours)
    expected, found = results(theirs, x), results(ours, x)
    assert fused_calls(ours) - before == fused
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert_close(found[name], t, TOLERANCES[x.dtype], name)


@pytest.mark.parametrize("alphas", [(6, 6, 6), (6, -1, 0)], ids=["alike", "apart"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_one_call_gives_pefts_sum_and_gradients(dtype, bias, alphas):
    theirs, ours = make(dtype, dtype, alphas, bias=bias)
    assert_alike(theirs, ours, torch.randn(2, 5, 24, dtype=dtype))
    for names in (["third", "default"], ["second"], ["second", "second"]):
        for model in (theirs, ours):
            layer(model).set_adapter(names)
            model.requires_grad_(False)
            for name, t in model.named_parameters():
                t.requires_grad_("lora_" in name)
        assert_alike(theirs, ours, torch.randn(7, 24, dtype=dtype))


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alphas", [(6, 6, 6), (6, 1, 3)], ids=["alike", "apart"])
def test_bfloat16_errs_as_much_as_peft(adapters, alphas):
    theirs, ours = make(torch.bfloat16, adapters, alphas)
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(64, 24, dtype=torch.bfloat16)
    expected, errors = results(exact, x.double()), []
    for model in (theirs, ours):
        # Beside wider adapters PEFT's branch is float32 where autocast is off.
        with torch.autocast("cpu", torch.bfloat16, enabled=adapters == torch.float32):
            found = results(model, x)
        errors.append([(found[n].double() - t).norm() / t.norm() for n, t in expected.items()])
    assert fused_calls(ours) == 1
    assert all(our <= 1.5 * their + 1e-3 for their, our in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("alphas", [(6, 6, 6), (6, 1, 3)], ids=["alike", "apart"])
def test_float16_under_autocast(alphas):
    theirs, ours = make(torch.float16, torch.float16, alphas)
    x = torch.randn(64, 24, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(x), theirs(x)
    assert_close(got, expected, 0.02)
    assert fused_calls(ours) == 1


def test_dropout_is_left_to_peft_in_training_alone():
    theirs, ours = make(p=0.5)
    x = torch.randn(6, 24)
    assert_alike(theirs, ours, x, fused=0)
    for model in (theirs, ours):
        model.eval()
    assert_alike(theirs, ours, x)


def mixed_dtypes(layer):
    layer.lora_A["second"].half()
    layer.lora_B["second"].half()


def many_ranks(layer):
    layer.update_layer("second", 300, lora_alpha=300, config=peft.LoraConfig(r=300))
    layer.set_adapter(list(RANKS))


def with_bias(layer):
    layer.lora_B["second"].bias = nn.Parameter(torch.ones(40))


def scaled_by_tensor(layer):
    layer.scaling["second"] = torch.tensor(2.0)


def hooked(layer):
    layer.lora_A["second"].register_forward_hook(lambda module, args, y: 2 * y)


# What keeps PEFT's forward, by what the report says.
CHANGES = {
    "dtypes or devices differ": mixed_dtypes,
    "ranks are more than 256": many_ranks,
    "lora_B has a bias": with_bias,
    "the scaling of 'second' is": scaled_by_tensor,
    "lora_A has hooks": hooked,
}


@pytest.mark.parametrize(("reason", "change"), CHANGES.items(), ids=CHANGES)
def test_what_does_not_fit_is_left_to_peft(reason, change):
    theirs, ours = make()
    for model in (theirs, ours):
        torch.manual_seed(1)
        change(layer(model))
    x = torch.randn(4, 24)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    use = next(iter(lk.report(ours).layers.values()))
    assert (use.fused, use.left) == (0, 1)
    assert use.state.startswith("3 active adapters: ")
    assert reason in use.state


@pytest.mark.parametrize("size", [0, 3])
def test_an_emptied_factor_is_pefts_to_refuse(size):
    """torch.cat would leave it out without a word."""
    theirs, ours = make()
    for model in (theirs, ours):
        layer(model).lora_A["second"].weight.data = torch.empty(size)
    errors = []
    for model in (theirs, ours):
        with pytest.raises(RuntimeError) as raised:
            model(torch.randn(4, 24))
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_a_factor_without_memory_is_named():
    _, ours = make()
    layer(ours).lora_B["third"].weight.data.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="lora_B: expected memory"):
        ours(torch.randn(4, 24))


@pytest.mark.unpoisoned
def test_compiled_whole():
    theirs, ours = make()
    x = torch.randn(4, 24)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected, found = results(theirs, x), results(compiled, x)
    for (name, t), other in zip(expected.items(), found.values(), strict=True):
        assert_close(other, t, what=name)

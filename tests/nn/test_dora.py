"""`LoRALinear(use_dora=True)`: PEFT's layer, merging, files, calls that aren't fused."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk

MAGNITUDE = "lora_magnitude_vector.weight"


def make(dtype=torch.float64, trained=True, **settings):
    layer = lk.LoRALinear(13, 9, r=4, lora_alpha=6, use_dora=True, dtype=dtype, **settings)
    if trained:
        nn.init.normal_(layer.lora_B.weight)
        with torch.no_grad():
            layer.get_parameter(MAGNITUDE).mul_(torch.linspace(-0.5, 1.5, 9))
            layer.get_parameter(MAGNITUDE)[2] = 0.0
    return layer


def of_peft(layer):
    """Return PEFT's layer with the same tensors."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer.base_layer)), config)
    found = model.base_model.model[0].to(layer.lora_A.weight.dtype)
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        getattr(found, name)["default"].load_state_dict(getattr(layer, name).state_dict())
    return found


def test_a_new_layer_computes_what_its_base_does_and_trains_as_pefts():
    layer, x = make(trained=False), torch.randn(2, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    layer = make()
    theirs = of_peft(layer)
    trained = [n for n, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["lora_A.weight", "lora_B.weight", MAGNITUDE]
    y, expected = layer(x), theirs(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        one, other = getattr(layer, name).weight, getattr(theirs, name)["default"].weight
        torch.testing.assert_close(one.grad, other.grad)


def test_calls_are_fused_or_composed_with_the_same_result():
    layer, x = make(), torch.randn(5, 13, dtype=torch.float64)
    y = layer(x)
    assert layer._lora_kernels_calls.fused == 1
    for module in (layer.lora_A, layer.lora_magnitude_vector):
        hook = module.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(layer(x), y)
        assert "has hooks" in layer.left_reason()
        hook.remove()
    layer.lora_magnitude_vector._call_impl = lambda *args: torch.zeros_like(y)
    assert not layer(x).any()
    del layer.lora_magnitude_vector._call_impl
    assert layer.left_reason() is None
    layer.lora_dropout = 0.5
    with torch.no_grad():
        means = []
        for hooked in (False, True):
            if hooked:
                layer.lora_A.register_forward_hook(lambda *_: None)
            means.append(torch.stack([layer(x) for _ in range(2000)]).mean(0))
    torch.testing.assert_close(*means, rtol=0, atol=0.4)
    assert (means[0] - y).abs().max() < 0.4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unmerge_are_pefts(dtype):
    layer, x = make(dtype), torch.randn(5, 13, dtype=dtype)
    theirs, y, own = of_peft(layer), layer(x), layer.base_layer.weight
    before = own.clone()
    expected = layer.weight
    layer.merge()
    theirs.merge()
    tolerance = {"rtol": 0, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(layer.base_layer.weight, theirs.base_layer.weight, **tolerance)
    torch.testing.assert_close(layer.base_layer.weight, expected.detach())
    torch.testing.assert_close(layer(x), y, **tolerance)
    layer.unmerge()
    assert layer.base_layer.weight is own
    assert torch.equal(own, before)


def test_two_adapters_merge_and_unmerge_in_any_order():
    base = nn.Linear(13, 9, dtype=torch.float64)
    one, other = (lk.LoRALinear.from_linear(base, r=2, use_dora=d) for d in (True, False))
    for layer in (one, other):
        nn.init.normal_(layer.lora_B.weight)
    nn.init.normal_(one.get_parameter(MAGNITUDE))
    before, alone = base.weight.clone(), one.weight.detach()
    one.merge()
    other.merge()
    other.unmerge()
    torch.testing.assert_close(base.weight, alone)
    other.merge()
    one.unmerge()
    update = other.scaling * other.lora_B.weight @ other.lora_A.weight
    torch.testing.assert_close(base.weight, before + update)
    other.unmerge()
    assert torch.equal(base.weight, before)


def test_what_was_written_to_a_merged_weight_is_kept():
    layer = make()
    before = layer.base_layer.weight.clone()
    layer.merge()
    gain = layer._merged_updates[0].gain
    with torch.no_grad():
        layer.base_layer.weight.add_(gain[:, None])
    layer.unmerge()
    # A gain of 0 left nothing of that row to add to.
    expected = torch.where(gain[:, None] == 0, before, before + 1)
    torch.testing.assert_close(layer.base_layer.weight, expected)


def test_it_is_copied_pickled_shown_and_reset():
    layer, x = make(), torch.randn(2, 13, dtype=torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert "use_dora=True" in repr(layer)
    assert "dora" not in repr(lk.LoRALinear(4, 4)).lower()
    layer.reset_lora_parameters()
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    assert lk.prepack_(layer).left == {"": "DoRA reads no packed weight"}


def test_nothing_is_cached_between_steps_of_a_fused_optimizer():
    """`_version` doesn't move under it: the norm is formed anew at each call."""
    layer, x = make(torch.float32), torch.randn(5, 13)
    optimizer = torch.optim.AdamW(
        [p for p in layer.parameters() if p.requires_grad], lr=0.05, fused=True
    )
    for step in range(100):
        layer.train(step % 2 == 0)
        y = layer(x)
        linear = layer.base_layer
        sum_ = linear.weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
        gain = layer.get_parameter(MAGNITUDE) / sum_.norm(dim=1)
        expected = x @ (gain[:, None] * sum_).T + linear.bias
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
    layer.lora_A.weight.data.mul_(2.0)
    with torch.no_grad():
        a = layer(x)
        layer.eval()
        assert torch.equal(layer(x), a)
        layer.lora_alpha = 12
        assert not torch.equal(layer(x), a)


@pytest.mark.unpoisoned
def test_it_compiles_whole():
    torch._dynamo.reset()
    layer, x = make(torch.float32), torch.randn(3, 13)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_quantised_base_is_refused_by_name():
    layer, x = make(torch.float32), torch.randn(2, 13)
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer.base_layer))[0]
    layer.base_layer = quantised
    with pytest.raises(TypeError, match=r"base_layer\.weight: expected floats"):
        layer(x)

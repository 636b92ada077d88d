"""PEFT's DoRA layers, patched: as unpatched, whatever happens to their tensors between calls."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk

peft = pytest.importorskip("peft")


def models(dropout=0.0, linear=nn.Linear, **settings):
    """Return a model of two DoRA layers, patched, and its unpatched twin."""
    config = peft.LoraConfig(
        r=4, use_dora=True, lora_dropout=dropout, target_modules=["0", "2"],
        init_lora_weights=False, **settings,
    )  # fmt: skip
    base = nn.Sequential(linear(13, 16), nn.Tanh(), linear(16, 9)).double()
    plain = peft.get_peft_model(base, config)
    for name, parameter in plain.named_parameters():
        if "magnitude" in name:
            nn.init.normal_(parameter)
    patched = copy.deepcopy(plain)
    report = lk.patch_peft(patched)
    assert len(report.patched) == 2
    assert not report.left
    return patched, plain


def fused(model):
    return sum(use.fused for use in lk.report(model).layers.values())


def assert_same(patched, plain, x):
    """Compare outputs and gradients; both calls of the patched model are fused."""
    before = fused(patched)
    grads, ys = [], []
    for model in (patched, plain):
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        ys.append(y.detach())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert fused(patched) == before + 2
    torch.testing.assert_close(*ys)
    torch.testing.assert_close(*grads)
    assert len(grads[0]) == 6


def test_values_and_gradients_through_changes_of_state():
    patched, plain = models()
    x = torch.randn(3, 5, 13, dtype=torch.float64)
    assert_same(patched, plain, x)
    for change in (
        lambda m: m.eval(),
        lambda m: m.train(),
        lambda m: m.base_model.model[0].set_scale("default", 3.0),
        lambda m: m.base_model.model[0].lora_A["default"].weight.data.mul_(2.0),
        lambda m: m.base_model.model[2].base_layer.weight.data.add_(0.1),
        lambda m: m.load_state_dict({k: v / 2 for k, v in m.state_dict().items()}),
        lambda m: m.merge_adapter() or m.unmerge_adapter(),
    ):
        for model in (patched, plain):
            change(model)
        assert_same(patched, plain, x)


def test_adapters_are_switched():
    patched, plain = models()
    x = torch.randn(5, 13, dtype=torch.float64)
    config = peft.LoraConfig(r=3, use_dora=True, target_modules=["0", "2"], init_lora_weights=False)
    for model in (patched, plain):
        torch.manual_seed(5)
        model.add_adapter("other", config)
        model.double()
    for name in ("other", "default", "other"):
        patched.set_adapter(name)
        plain.set_adapter(name)
        assert_same(patched, plain, x)


@pytest.mark.parametrize("alternate", [False, True])
def test_a_hundred_steps_of_fused_adamw(alternate):
    """Which changes parameters without a trace in `_version`."""
    patched, plain = models()
    x = torch.randn(5, 13, dtype=torch.float64)
    losses = []
    for model in (patched, plain):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, found = torch.optim.AdamW(trained, lr=0.01, fused=True), []
        for step in range(100):
            model.train(not alternate or step % 2 == 0)
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert fused(patched) == 200
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-8, atol=1e-10)
    assert losses[0][-1] < losses[0][0] / 2


def test_dropout_is_on_where_the_layer_and_the_dropout_train():
    patched, plain = models(dropout=0.5)
    x = torch.randn(40, 13, dtype=torch.float64)
    assert not torch.equal(patched(x), patched(x))
    means = []
    with torch.no_grad():
        for model in (patched.base_model.model[0], plain.base_model.model[0]):
            means.append(torch.stack([model(x) for _ in range(3000)]).mean(0))
    assert (means[0] - means[1]).abs().max() < 0.06 * means[1].abs().max()
    for model in (patched, plain):
        model.eval()
        model.base_model.model[0].lora_dropout.train()  # PEFT asks the layer alone
    assert_same(patched, plain, x)


def test_weights_stored_by_columns():
    """GPT-2's Conv1D keeps W as [K, N]."""
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
    patched, plain = models(linear=lambda k, n: conv(n, k), fan_in_fan_out=True)
    x = torch.randn(3, 5, 13, dtype=torch.float64)
    assert_same(patched, plain, x)
    for model in (patched, plain):
        model.merge_adapter()
    torch.testing.assert_close(patched(x), plain(x))
    for model in (patched, plain):
        model.unmerge_adapter()
        model.eval()
    assert_same(patched, plain, x)


def test_one_vector_becomes_a_row_as_with_peft():
    patched, plain = (model.base_model.model[0] for model in models())
    x = torch.randn(13, dtype=torch.float64)
    torch.testing.assert_close(patched(x), plain(x))
    assert patched(x).shape == (1, 16)


def test_what_is_not_fused_keeps_pefts_forward_and_says_why():
    patched, plain = models()
    x = torch.randn(5, 13, dtype=torch.float64)
    module = patched.base_model.model[0].lora_magnitude_vector["default"]
    handle = module.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(patched(x), plain(x))
    assert "lora_magnitude_vector has hooks" in str(lk.report(patched))
    handle.remove()
    assert_same(patched, plain, x)
    own = module._call_impl
    module._call_impl = lambda *args, **kwargs: 2 * own(*args, **kwargs)
    assert not torch.allclose(patched(x), plain(x))
    assert "lora_magnitude_vector has hooks" in str(lk.report(patched))
    del module._call_impl
    lk.unpatch_peft(patched)
    torch.testing.assert_close(patched(x), plain(x))

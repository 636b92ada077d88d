"""PEFT's embedding and convolutions with a fused forward: results, losses, and what is left."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.native import absence

peft = pytest.importorskip("peft")

F64 = torch.float64
IDS = torch.arange(22).reshape(2, 11) % 11


def model_of(base, **settings):
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False, **settings
    )
    return peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)


def fused(model):
    """Patch a model of one layer, and return that."""
    report = lk.patch_peft(model)
    assert len(report.patched) + len(report.left) == 1
    return model.base_model.model[0]


def make(kind, dtype=F64, **how):
    if kind == "embedding":
        return nn.Embedding(11, 6, dtype=dtype, **how), IDS
    dims = int(kind[-2])
    base = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 6, 3, dtype=dtype, **how)
    return base, torch.randn(2, 4, *(5, 6, 7)[:dims], dtype=dtype)


def losses(model, x, steps=3):
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for _ in range(steps):
        loss = model(x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", ["embedding", "conv1d", "conv2d", "conv3d"])
def test_it_trains_as_pefts_own(kind):
    base, x = make(kind)
    model = model_of(base, lora_dropout=0.0)
    other = copy.deepcopy(model)
    layer = fused(other)
    torch.testing.assert_close(losses(other, x), losses(model, x), rtol=1e-12, atol=1e-12)
    assert layer._lora_kernels_calls.fused == 3
    assert layer._lora_kernels_calls.left == 0
    assert isinstance(copy.deepcopy(layer), type(layer))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["embedding", "conv1d", "conv2d", "conv3d"])
def test_an_empty_batch(kind, p):
    base, x = make(kind)
    model = model_of(base, lora_dropout=p)
    layer = fused(model)
    y = model(x[:0])
    assert layer._lora_kernels_calls.left == 0
    assert y.shape == base(x[:0]).shape
    y.sum().backward()
    assert not any(q.grad.any() for q in model.parameters() if q.requires_grad)


def test_a_scaled_embedding():
    modeling = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    base = modeling.Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5).to(F64)
    model = model_of(base)
    expected = model(IDS)
    layer = fused(model)
    torch.testing.assert_close(model(IDS), expected)
    assert layer._lora_kernels_calls.fused == 1


def hooked(base):
    base.register_forward_hook(lambda *_: None)
    return base


LEFT = {
    "max_norm": (lambda: make("embedding", max_norm=1.0), {}, "base layer has max_norm"),
    "sparse": (lambda: make("embedding", sparse=True), {}, "base layer has sparse"),
    "frequencies": (
        lambda: make("embedding", scale_grad_by_freq=True), {}, "base layer has scale_grad_by_freq",
    ),
    "hooks": (lambda: (hooked(nn.Embedding(11, 6)), IDS), {}, "base layer has hooks"),
    "DoRA": (lambda: make("conv2d"), {"use_dora": True}, "LoRA variant DoraConv2dVariant"),
    "reflect": (
        lambda: make("conv2d", padding=1, padding_mode="reflect"), {}, "padding_mode 'reflect'",
    ),
    "lora_bias": (lambda: make("conv2d"), {"lora_bias": True}, "lora_A or lora_B has a bias"),
    "of another dtype": (
        lambda: (make("conv2d")[0], torch.randn(2, 4, 5, 5)), {}, "weight: expected the dtype of x",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("made", "settings", "reason"), LEFT.values(), ids=LEFT)
def test_what_does_not_fit_keeps_pefts_forward(made, settings, reason):
    base, x = made()
    model = model_of(base, **settings)
    try:
        expected = model(x)
    except RuntimeError as error:
        expected = error
    layer = fused(model)
    if isinstance(expected, RuntimeError):
        with pytest.raises(RuntimeError):
            model(x)
    else:
        assert torch.equal(model(x), expected)
    assert reason in layer._lora_kernels_calls.reason
    assert layer._lora_kernels_calls.fused == 0


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_states_of_a_layer(kind):
    base, x = make(kind)
    model = model_of(base)
    layer = fused(model)
    y, calls = model(x), layer._lora_kernels_calls
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert calls.reason == "adapters disabled"
    layer.merge()
    torch.testing.assert_close(model(x), y)
    assert calls.reason == "merged: default"
    layer.unmerge()
    torch.testing.assert_close(model(x), y)
    assert (calls.fused, calls.left) == (2, 2)


def three_layers():
    base = nn.Sequential(nn.Linear(6, 6), nn.Embedding(11, 6), nn.Conv2d(4, 6, 3))
    config = peft.LoraConfig(r=2, target_modules=["0", "1", "2"], init_lora_weights=False)
    return peft.get_peft_model(base, config)


def kinds(model):
    return [type(layer).__name__ for layer in model.base_model.model]


PEFTS, OURS = ["Linear", "Embedding", "Conv2d"], ["FusedLinear", "FusedEmbedding", "FusedConv2d"]


def test_a_report_names_what_runs_each_layer():
    model = three_layers()
    report = lk.patch_peft(model)
    assert not report.left
    linear, embedding, conv = (report.implementations[path] for path in report.patched)
    assert (embedding, conv) == (linear, "eager")
    assert kinds(model) == OURS
    assert [use.state for use in lk.report(model).layers.values()] == [None] * 3
    assert lk.unpatch_peft(model) == 3
    assert kinds(model) == PEFTS


@pytest.mark.skipif(absence("cpu") is not None, reason="needs the compiled CPU part")
@pytest.mark.parametrize("before", [None, "auto"])
def test_a_named_implementation_is_one_of_linear_layers(before):
    """What it has no kernel of is PEFT's, also where an earlier call has fused it."""
    model = three_layers()
    if before is not None:
        lk.patch_peft(model, impl=before)
    report = lk.patch_peft(model, impl="cpu")
    assert list(report.left.values()) == ["'cpu' has no lora_conv"]
    assert kinds(model) == [*OURS[:2], PEFTS[2]]
    assert kinds_after_another(three_layers(), "cpu") == [*OURS[:2], PEFTS[2]]


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_layers_of_an_adapter_that_comes_later(impl):
    assert kinds_after_another(three_layers(), impl) == OURS


def kinds_after_another(model, impl):
    """The layers of a model whose second adapter has them all, the first the linear one."""
    small = peft.LoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(model.unload(), small)
    lk.patch_peft(model, impl=impl)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0", "1", "2"]))
    return kinds(model)


@pytest.mark.parametrize("scaling", [np.float32(1.5), Fraction(3, 2), True], ids=str)
def test_an_embedding_is_scaled_by_any_number_that_pefts_is(scaling):
    base, x = make("embedding")
    model = model_of(base)
    model.base_model.model[0].scaling["default"] = scaling if scaling is True else float(scaling)
    expected = model(x)
    layer = fused(model)
    layer.scaling["default"] = scaling
    torch.testing.assert_close(model(x), expected)
    assert layer._lora_kernels_calls.fused == 1


def test_a_convolution_is_named_whose_input_was_changed_before_backward():
    base, x = make("conv2d")
    model = model_of(base)
    fused(model)
    y = model(x)
    x += 1
    with pytest.raises(RuntimeError, match=r"LoRA layer 'base_model\.model\.0': expected its"):
        y.sum().backward()

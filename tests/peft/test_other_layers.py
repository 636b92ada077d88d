"""PEFT's embedding and convolutions with a fused forward: results, losses, and what is left."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels.usage import Calls

peft = pytest.importorskip("peft")
from lora_kernels._peft.other import FUSED  # noqa: E402  it imports peft

F64 = torch.float64
IDS = torch.arange(22).reshape(2, 11) % 11


def model_of(base, **settings):
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False, **settings
    )
    return peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)


def fused(model, impl="auto"):
    """Swap the class of a model's one layer as patch_peft will."""
    layer = model.base_model.model[0]
    layer.__class__ = FUSED[type(layer)]
    vars(layer).update(_lora_kernels_impl=impl, _lora_kernels_calls=Calls())
    return layer


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

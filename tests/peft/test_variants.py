"""What is left to PEFT for a reason: the report gives it."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from tests.support.closeness import assert_close

peft = pytest.importorskip("peft")
variants = pytest.importorskip("peft.tuners.lora.variants")

REASONS = {
    "ALoraLinearVariant": "aLoRA adapts the tokens after its invocation",
    "ArrowLinearVariant": "Arrow weighs several adapters anew for each token",
    "BdLoraLinearVariant": "BD-LoRA has lora_A or lora_B in diagonal blocks",
    "QALoraLinearVariant": "QA-LoRA pools x in groups before lora_A",
}


def with_variant(name):
    kind = getattr(variants, name, None)
    if kind is None:
        pytest.skip(f"peft {peft.__version__} has no {name}")
    config = peft.LoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    model.base_model.model[0].lora_variant["default"] = kind()
    return model


@pytest.mark.parametrize("name", REASONS)
def test_a_variant_is_left_with_the_reason(name):
    model = with_variant(name)
    expected = f"LoRA variant {name}: {REASONS[name]}"
    assert lk.patch_peft(model).left == {"base_model.model.0": expected}
    assert lk.report(model).layers["base_model.model.0"].state == expected


def test_a_layer_of_another_library_is_left_with_its_variants_reason():
    """QA-LoRA is one of GPTQ's layers, which needs that library."""
    from lora_kernels._peft.variants import layer_reason

    if not hasattr(variants, "QALoraLinearVariant"):
        pytest.skip("an older peft")
    kind = type("GPTQLoraLinear", (), {"__module__": "peft.tuners.lora.gptq"})
    layer = kind()
    layer.lora_variant = {}
    assert layer_reason(layer) == "lora.gptq.GPTQLoraLinear has no fused forward"
    layer.lora_variant = {"default": variants.QALoraLinearVariant()}
    expected = "lora.gptq.GPTQLoraLinear has no fused forward: QA-LoRA pools x in groups"
    assert layer_reason(layer).startswith(expected)


def test_multihead_attention_is_left_with_the_reason():
    model = attention()[1]
    (reason,) = {r for p, r in lk.patch_peft(model).left.items() if p.endswith("att")}
    assert reason.startswith("lora.layer.MultiheadAttention has no fused forward: PEFT computes")
    assert "W + 2Δ in out_proj" in reason
    assert "peft#3774" in reason


def attention():
    base = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["att"], init_lora_weights=False, bias="none"
    )
    model = peft.get_peft_model(nn.ModuleDict({"att": copy.deepcopy(base)}), config).double()
    return base, model


@pytest.mark.skipif(not peft.__version__.startswith("0.21"), reason="said of peft 0.21")
def test_the_reason_is_so():
    base, model = attention()
    layer, x = model.base_model.model["att"], torch.randn(1, 5, 8, dtype=torch.float64)
    nn.init.zeros_(layer.lora_B["default"].weight)  # of in_proj
    delta = layer.base_layer.out_proj.get_delta_weight("default")
    with torch.no_grad():
        base.out_proj.weight += 2 * delta
        torch.testing.assert_close(layer(x, x, x)[0], base(x, x, x)[0])
    assert delta.norm() > 1e-3


def adapted(dtype=torch.float64, dropout=0.0, **settings):
    """Return a model of two layers of a variant, patched, and its unpatched twin."""
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["0", "2"], lora_dropout=dropout, **settings
    )
    base = nn.Sequential(nn.Linear(13, 16), nn.Tanh(), nn.Linear(16, 9))
    plain = peft.get_peft_model(base, config).to(dtype)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:  # else one factor is zero
            nn.init.normal_(parameter)
    patched = copy.deepcopy(plain)
    lk.patch_peft(patched)
    return patched, plain


def mica():
    return {"init_lora_weights": "mica"}


def kasa():
    return {"kasa_config": peft.tuners.lora.config.KasaConfig()}


def settings_of(make):
    if not hasattr(variants, {mica: "MiCALinearVariant", kasa: "KasaLinearVariant"}[make]):
        pytest.skip(f"peft {peft.__version__} has none")
    return make()


def assert_same(patched, plain, x):
    counts = [sum(use.fused for use in lk.report(patched).layers.values())]
    ys, grads = [], []
    for model in (patched, plain):
        model.zero_grad()
        ys.append(model(x))
        ys[-1].square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    counts.append(sum(use.fused for use in lk.report(patched).layers.values()))
    assert counts[1] - counts[0] == 2
    torch.testing.assert_close(*ys)
    torch.testing.assert_close(*grads)
    return set(grads[0])


@pytest.mark.parametrize("make", [mica, kasa])
def test_variants_that_are_lora_of_other_factors_are_fused(make):
    patched, plain = adapted(**settings_of(make))
    x = torch.randn(2, 5, 13, dtype=torch.float64)
    kinds = {name.split(".")[3] for name in assert_same(patched, plain, x)}
    assert kinds == ({"lora_A"} if make is mica else {"lora_A", "lora_B", "lora_diag"})
    for change in (
        lambda m: m.eval(),
        lambda m: m.base_model.model[0].set_scale("default", 3.0),
        lambda m: m.base_model.model[0].lora_B["default"].weight.data.mul_(2.0),
        lambda m: [p.data.mul_(1.5) for n, p in m.named_parameters() if "lora_diag" in n],
        lambda m: m.load_state_dict({k: v / 2 for k, v in m.state_dict().items()}),
        lambda m: m.merge_adapter() or m.unmerge_adapter(),
    ):
        for model in (patched, plain):
            change(model)
        assert_same(patched, plain, x)


@pytest.mark.parametrize("make", [mica, kasa])
def test_their_dropout_is_that_of_lora(make):
    patched, plain = adapted(dropout=0.5, **settings_of(make))
    layers = [model.base_model.model[0] for model in (patched, plain)]
    x = torch.randn(40, 13, dtype=torch.float64)
    with torch.no_grad():
        means = [torch.stack([layer(x) for _ in range(3000)]).mean(0) for layer in layers]
    assert (means[0] - means[1]).abs().max() < 0.06 * means[1].abs().max()


@pytest.mark.parametrize("make", [mica, kasa])
def test_they_train_as_unpatched_under_autocast(make):
    patched, plain = adapted(torch.float32, **settings_of(make))
    # Of fewer rows a loss of KaSA is off by up to 6 % for bfloat16's roundings alone.
    x, losses = torch.randn(200, 13), []
    for model in (patched, plain):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, found = torch.optim.AdamW(trained, lr=0.01, fused=True), []
        for _ in range(5):  # beyond, AdamW's steps carry each rounding on
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.05, atol=0.05)
    assert losses[0][-1] < losses[0][0]


def test_a_diagonal_that_does_not_fit_and_a_truncation_to_come_are_pefts():
    patched, plain = adapted(**settings_of(kasa))
    x = torch.randn(5, 13, dtype=torch.float64)
    layer = patched.base_model.model[0]
    layer._lora_kasa_truncation_deferred.add("default")
    assert layer._lora_kernels_left() == "KaSA truncates the base weight in its first call"
    layer._lora_kasa_truncation_deferred.clear()
    for model in (patched, plain):
        diagonal = model.base_model.model[0].lora_diag["default"]
        diagonal.data = diagonal.data.float()
    assert "lora_diag is torch.float32" in layer._lora_kernels_left()
    torch.testing.assert_close(patched(x), plain(x))


def test_they_compile_whole():
    torch._dynamo.reset()
    for make in (mica, kasa):
        patched, plain = adapted(torch.float32, **settings_of(make))
        x = torch.randn(5, 13)
        compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), plain(x), 1e-5)

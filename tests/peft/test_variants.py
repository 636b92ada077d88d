"""What is left to PEFT for a reason: the report gives it."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk

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

"""Why PEFT keeps the forward of variants and layers that have no fused one.

What isn't named here has no fused forward for want of one, not because there is a reason.
"""

from typing import Any

_VARIANTS = {
    "ALoraLinearVariant": "aLoRA adapts the tokens after its invocation",
    "ArrowLinearVariant": "Arrow weighs several adapters anew for each token",
    "BdLoraLinearVariant": "BD-LoRA has lora_A or lora_B in diagonal blocks",
    "QALoraLinearVariant": "QA-LoRA pools x in groups before lora_A",
}
_LAYERS = {
    # 2026-11-28, PEFT 0.21: it merges the adapter before each call, into out_proj twice.
    "MultiheadAttention": (
        "PEFT computes with W + 2Δ in out_proj, its gradient is that of W + Δ (peft#3774 mends it)"
    ),
}


def variant_reason(variant: Any) -> str:
    """Return why a layer with a variant of LoRA keeps PEFT's forward."""
    name = type(variant).__name__
    return f"LoRA variant {name}{_because(_VARIANTS.get(name))}"


def layer_reason(layer: Any) -> str:
    """Return why a layer of PEFT's whose class has no fused forward keeps its own."""
    kind = type(layer)
    name = f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__qualname__}"
    found = (_VARIANTS.get(type(each).__name__) for each in layer.lora_variant.values())
    why = _LAYERS.get(kind.__name__) or next(filter(None, found), None)
    return f"{name} has no fused forward{_because(why)}"


def _because(why: str | None) -> str:
    return "" if why is None else f": {why}"

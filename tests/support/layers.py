"""One adapted layer as three kinds have it, and as torch has it, as functions of its tensors."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

import lora_kernels as lk

SCALING = 1.5
KINDS = ("patched", "LoRALinear", "lora_linear")


class Tensors(NamedTuple):
    x: Tensor
    a: Tensor
    b: Tensor


def make_tensors(m=5, n=4, k=6, r=2, dtype=torch.float64, trained=True):
    """Return x, lora_A and lora_B, leaves that require grad unless told otherwise."""
    drawn = (torch.randn(shape, dtype=dtype) for shape in ((m, k), (r, k), (n, r)))
    return Tensors(*(t.requires_grad_(trained) for t in drawn))


def make_base(n=4, k=6, dtype=torch.float64):
    return nn.Linear(k, n, dtype=dtype).requires_grad_(False)


def peft_layer(base, patched=True, r=2, **settings):
    """Return a model of one PEFT layer, base_model.model.0."""
    import peft

    config = peft.LoraConfig(
        r=r, lora_alpha=SCALING * r, target_modules=["0"], init_lora_weights=False, **settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a base that was adapted before
        model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    if patched:
        lk.patch_peft(model)
    return model


def plain(base):
    """The layer's definition, y = x Wᵀ + bias + scaling · x Aᵀ Bᵀ."""
    return lambda x, a, b: base(x) + SCALING * (x @ a.mT @ b.mT)


def layer_of(kind, base, impl="auto", **settings):
    """Return the layer as a function of x, lora_A and lora_B; "peft" is the unpatched one."""
    if kind == "lora_linear":
        options = {"scaling": SCALING, "training": True, "impl": impl, **settings}
        return lambda x, a, b: lk.lora_linear(x, base.weight, a, b, base.bias, **options)
    if kind == "LoRALinear":
        module, path = lk.LoRALinear.from_linear(base, r=2, lora_alpha=3, impl=impl, **settings), ""
        names = ("lora_A.weight", "lora_B.weight")
    else:
        module, path = peft_layer(base, kind == "patched", **settings), "base_model.model.0."
        if kind == "patched" and impl != "auto":
            lk.patch_peft(module, impl=impl)
        names = ("lora_A.default.weight", "lora_B.default.weight")
    return lambda x, a, b: functional_call(
        module, {f"{path}{names[0]}": a, f"{path}{names[1]}": b}, (x,)
    )

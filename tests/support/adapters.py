"""What tests of adapter files share: a model to adapt, its state, a directory's files."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_kernels as lk

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(12, 8)
        self.k = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.k(self.q(x).tanh())


class Net(nn.Module):
    """`q` is a path and another's end, sorted before it; `z.k` as a pattern fits `zok` too."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.z = Block()
        self.zok = nn.Linear(8, 8)

    def forward(self, x):
        return self.zok(self.z(self.norm(self.q(x))))


def adapt(model, settings, **shared):
    """Replace the linears named in `settings` by LoRALinears with a random adapter and bias."""
    for path, own in settings.items():
        linear = model.get_submodule(path)
        layer = lk.LoRALinear.from_linear(linear, **{"r": 2, "lora_alpha": 6, **shared, **own})
        nn.init.normal_(layer.lora_B.weight)
        if layer.use_dora:
            nn.init.normal_(layer.lora_magnitude_vector.weight)
        if layer.bias_mode != "none" and layer.bias is not None:
            nn.init.normal_(layer.bias)
        model.set_submodule(path, layer)
    return model


def snapshot(model):
    """All that loading may change: types and settings, values, what is trained."""
    values = {key: value.clone() for key, value in model.state_dict().items()}
    return repr(model), values, {name: p.requires_grad for name, p in model.named_parameters()}


def assert_unchanged(model, before):
    text, values, trained = snapshot(model)
    assert text == before[0]
    assert trained == before[2]
    assert values.keys() == before[1].keys()
    assert all(torch.equal(value, before[1][key]) for key, value in values.items())


def listing(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def needs_trained_biases():
    """Skip where PEFT leaves biases of its own layers out of a file with bias "lora_only"."""
    installed = version("peft")
    if tuple(map(int, installed.split(".")[:2])) < (0, 21):
        pytest.skip(f"peft {installed} saves no biases with lora_only, 0.21 does")

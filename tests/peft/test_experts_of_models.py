"""Every module of experts that transformers decorates, alone: patched as unpatched."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from tests.peft.test_experts import Block, assert_same_block, patched, use_of

peft = pytest.importorskip("peft")
DECORATED = re.compile(r"@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)")


def _decorated():
    """Return the models and classes that transformers' sources decorate."""
    folder = Path(transformers.__file__).parent / "models"
    for file in sorted(folder.glob("*/modeling_*.py")):
        for name in DECORATED.findall(file.read_text()):
            yield f"{file.parent.name}.{file.stem}", name


class Config:
    """Numbers under the names that models have for them."""

    hidden_size, num_experts_per_tok = 16, 2
    _experts_implementation = "grouped_mm"

    def __getattr__(self, name):
        for part, value in (
            ("act", "silu"), ("limit", 7.0), ("cap", 7.0), ("alpha", 1.0), ("size", 8), ("dim", 8),
            ("eps", 1e-6), ("expert", 4),
        ):  # fmt: skip
            if part in name:
                return value
        raise AttributeError(name)


CLASSES = list(_decorated())


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_experts(module, name):
    kind = getattr(import_module(f"transformers.models.{module}"), name)
    try:
        experts = kind(Config())
    except TypeError:  # some take the layer's number
        experts = kind(Config(), 0)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.3)
    targets = [f"experts.{n}" for n, p in experts.named_parameters() if p.ndim == 3]
    config = peft.LoraConfig(
        r=3, lora_alpha=4, target_modules=[], target_parameters=targets, init_lora_weights=False
    )
    plain = peft.get_peft_model(Block(experts), config)
    model = patched(plain)
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    gates, ids = torch.randn(9, first.shape[0]).softmax(-1).topk(2)
    x = torch.randn(9, first.shape[1 if experts.is_transposed else 2])
    assert_same_block(model, plain, (x, ids, gates), 1e-4)
    assert use_of(model).fused == 1


def test_there_are_some():
    assert len(CLASSES) > 30

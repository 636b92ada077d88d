"""Which calls to tune or to compile ahead: of sizes by hand, of a model, of a model's config."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels.impl.gpu import MAX_RANK
from lora_kernels.impl.triton.plan.config import Problem

_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)")


def layers_of(shapes: Iterable[str], bits: int) -> list[Problem]:
    """Return the calls that a shape MxNxKxR stands for: both directions, with and without dropout.

    Raises:
        ValueError: a shape is not four positive numbers, or has a rank that no kernel takes.
    """
    problems = []
    for shape in shapes:
        found = _SHAPE.fullmatch(shape)
        m, n, k, r = map(int, found.groups()) if found else (0, 0, 0, 0)
        if min(m, n, k, r) < 1:
            raise ValueError(f"shapes: expected MxNxKxR like 8192x4096x4096x16, got {shape!r}")
        if r > MAX_RANK:
            raise ValueError(f"shapes: expected ranks up to {MAX_RANK}, got {shape!r}")
        for backward in (False, True):
            for dropout in (False, True):
                problems.append(Problem(m, n, k, r, bits, dropout, True, backward))
    return problems


def shapes_of_config(directory: Path, targets: Sequence[str], rank: int, rows: int) -> list[str]:
    """Return the shapes of a model's layers, of which only the configuration is read.

    directory: holds the config.json of a causal language model of transformers. targets: ends of
    the paths of its layers, as PEFT's target_modules.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no layer has such a path.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = {
        (m.out_features, m.in_features)
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear) and any(f".{path}".endswith(f".{end}") for end in targets)
    }
    if not sizes:
        raise ValueError(f"target-modules: expected names of linear layers, got {list(targets)}")
    return [f"{rows}x{n}x{k}x{rank}" for n, k in sorted(sizes)]


def shapes_of_model(
    model: nn.Module, rows: int
) -> dict[tuple[torch.dtype, torch.dtype], list[str]]:
    """Return the shapes of a model's adapted linear layers, by the dtypes of W and of adapters.

    Adapters whose rank no kernel takes are left out: "eager" computes them.
    """
    found: dict[tuple[torch.dtype, torch.dtype], set[tuple[int, ...]]] = {}
    for module in model.modules():
        if getattr(module, "_lora_kernels_op", None) != "lora_linear":
            continue
        weight = getattr(getattr(module, "base_layer", None), "weight", None)
        if weight is None or not weight.is_floating_point() or weight.ndim != 2:
            continue
        for a in (a for a in _factors(module) if a.shape[0] <= MAX_RANK):
            sizes = (rows, *weight.shape, a.shape[0])
            found.setdefault((weight.dtype, a.dtype), set()).add(sizes)
    texts = ({"x".join(map(str, sizes)) for sizes in each} for each in found.values())
    return dict(zip(found, map(sorted, texts), strict=True))


def _factors(layer: Any) -> list[Any]:
    """Return lora_A of a layer of ours, or those of a patched one's adapters."""
    held = layer.lora_A
    modules = held.values() if isinstance(held, nn.ModuleDict) else [held]
    return [module.weight for module in modules]

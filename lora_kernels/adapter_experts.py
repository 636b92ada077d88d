"""Experts in PEFT's layout of adapters: which parameters a file adapts, and their tensors there.

PEFT wraps experts once for each adapted parameter, in the order in which the module has them: the
tensors of the last are named "lora_A.weight" after the path, those of the one before
"base_layer.lora_A.weight".
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_kernels.experts import kind_reason, names_of
from lora_kernels.nn import LoRAExperts
from lora_kernels.nn.experts import sizes_of

PAIR = ("lora_A.weight", "lora_B.weight")
INSIDE = "base_layer."
# The first PEFT by which A of experts acts on the inputs, however W is stored.
ORIENTED = [0, 19, 1]


def is_experts(module: nn.Module) -> bool:
    """Whether a module is experts that can be adapted."""
    return kind_reason(module) is None


def parameters_targeted(config: dict[str, Any], path: str, module: Any) -> list[str]:
    """Return the parameters of a module of experts that target_parameters name, as PEFT matches."""
    known = [n for n, _ in module.named_parameters(recurse=False) if n in names_of(module)]
    targets = config.get("target_parameters") or []
    full = {name: f"{path}.{name}" for name in known}
    return [n for n in known if any(f".{full[n]}".endswith(f".{target}") for target in targets)]


def adapted_parameters(config: dict[str, Any], path: str, layer: nn.Module) -> list[str]:
    """Return the parameters of experts that a file adapts; none of another layer.

    Raises:
        ValueError: they aren't those of an adapted layer, or the file may have A and B of the
            other orientation, that of PEFT before 0.19.1.
    """
    experts: Any = layer.base_layer if isinstance(layer, LoRAExperts) else layer
    if not is_experts(experts):
        return []
    found = parameters_targeted(config, path, experts)
    own = list(layer.lora_A) if isinstance(layer, LoRAExperts) else found
    if not found or found != own:
        raise ValueError(
            f"target_parameters: expected {', '.join(own) or 'parameters'} of "
            f"{path!r}, got {', '.join(found) or 'none'}"
        )
    version = str(config.get("peft_version") or "0")
    numbers = [int(number) for number in re.findall(r"\d+", version)[:3]]
    square = any(n == k for _, n, k in (sizes_of(experts, name) for name in found))
    if square and not experts.is_transposed and numbers < ORIENTED:
        raise ValueError(
            f"peft_version: expected {'.'.join(map(str, ORIENTED))} at least for "
            f"square weights of experts at {path!r}, whose lora_A acted on the outputs before, got "
            f"{version}"
        )
    return found


def shapes_of_experts(experts: Any, rank: int, parameters: Iterable[str]) -> dict[str, list[int]]:
    """Return the shapes of what a file has of experts, by part."""
    shapes = {}
    for depth, name in enumerate(reversed(list(parameters))):
        count, n, k = sizes_of(experts, name)
        for part, shape in zip(PAIR, ([count * rank, k], [n, rank * count]), strict=True):
            shapes[INSIDE * depth + part] = shape
    return shapes


def owner_of_part(layer: LoRAExperts, part: str) -> tuple[nn.ParameterDict, str]:
    """Return the dictionary that has a part's parameter, and its name there."""
    depth, factor = part.count(INSIDE), part.replace(INSIDE, "").partition(".")[0]
    return getattr(layer, factor), list(layer.lora_A)[-1 - depth]

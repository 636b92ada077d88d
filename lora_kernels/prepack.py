"""Pack and unpack the frozen weights of a model's adapted layers, for the compiled CPU part."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels._native import absence
from lora_kernels.bypass import read_linear
from lora_kernels.checks import is_dtensor
from lora_kernels.packing import Packed

PACKED_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PrepackReport:
    """What `prepack_` did: paths of layers now packed, of layers left with the reason, the memory.

    nbytes: memory of the packed copies, in bytes, beside the weights themselves.
    """

    packed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0

    def __str__(self) -> str:
        size = f"{self.nbytes / 2**20:.1f} MiB"
        lines = [
            f"lora_kernels: {len(self.packed)} weights packed in {size}, {len(self.left)} left"
        ]
        lines += [f"  left ({reason}): {path}" for path, reason in self.left.items()]
        return "\n".join(lines)


def prepack_(model: nn.Module, *, backward: bool = True) -> PrepackReport:
    """Pack the frozen weights of a model's adapted layers for faster products on the CPU.

    A packed copy serves as long as its weight does: once that is replaced, moved, merged into or
    changed in place, the copy is dropped and the weight itself is used; call this again to pack
    anew. Writes through `weight.data` can't be seen: call it again after them. Parameters,
    state_dict, saving and copying of the model are not touched. Results are those of the weight,
    but for the order of sums. Packed copies serve calls that `impl="cpu"` does: `explain` says
    which "auto" gives it.

    Args:
        model: a model with `LoRALinear` layers, or PEFT layers that `patch_peft` patched.
        backward: also pack Wᵀ for the gradient of x; without it memory is halved.

    Returns:
        A `PrepackReport`; `print(report)` is readable.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no adapted layer. The model is as it was.
    """
    layers = _adapted_layers(model)
    if not layers:
        raise ValueError(
            "model: expected one with LoRALinear layers or patched PEFT layers, got none in "
            f"{type(model).__name__} (call lora_kernels.patch_peft first)"
        )
    packed, left, nbytes = [], {}, 0
    for path, layer in layers:
        layer._lora_kernels_packed = None
        weight = _weight_to_pack(layer.base_layer)
        if isinstance(weight, str):
            left[path] = weight
            continue
        layer._lora_kernels_packed = Packed(weight, backward)
        nbytes += layer._lora_kernels_packed.nbytes
        packed.append(path)
    return PrepackReport(packed, left, nbytes)


def unprepack_(model: nn.Module) -> int:
    """Drop the packed copies of a model's weights; a model without any is left as it is.

    Args:
        model: a model that `prepack_` packed, or any other module.

    Returns:
        The number of layers that had one.

    Raises:
        TypeError: `model` is no module.
    """
    layers = [
        layer for _, layer in _adapted_layers(model) if layer._lora_kernels_packed is not None
    ]
    for layer in layers:
        layer._lora_kernels_packed = None
    return len(layers)


def _adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    # LoRALinear and a patched PEFT layer alone have the attribute.
    return [(path, m) for path, m in model.named_modules() if hasattr(m, "_lora_kernels_packed")]


def _weight_to_pack(base: nn.Module) -> Tensor | str:
    """Return the base layer's weight, or why it can't be packed."""
    read = read_linear(base)
    return f"base layer {read}" if isinstance(read, str) else _reason_left(read[0]) or read[0]


def _reason_left(weight: Tensor) -> str | None:
    absent = absence("cpu")
    if absent is not None:
        return f"the compiled CPU part is absent: {absent}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device}, not a CPU"
    if weight.dtype not in PACKED_DTYPES:
        return f"the weight is {weight.dtype}, not bfloat16 or float32"
    if weight.dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this CPU"
    if is_dtensor(weight):
        return "the weight is a DTensor"
    if type(weight) not in (nn.Parameter, Tensor):
        return f"the weight is a {type(weight).__name__}"
    if weight.ndim != 2 or weight.numel() == 0:
        return f"the weight has shape {list(weight.shape)}"
    if weight.requires_grad:
        return "the weight is not frozen"
    if weight.is_inference():
        return "the weight is an inference tensor, whose changes can't be seen"
    return None

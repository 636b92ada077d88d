"""Pack and unpack the frozen weights of a model's adapted layers, for the compiled CPU part."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora_kernels.bypass import read_linear
from lora_kernels.packing import Packed, reason_left
from lora_kernels.summary import Group, Summary, grouped


@dataclass(frozen=True)
class PrepackReport(Summary):
    """What `prepack_` did: paths of layers now packed, of layers left with the reason, the memory.

    Attributes:
        packed: paths of layers whose weights have a packed copy.
        left: paths of the others, with the reason.
        nbytes: memory of the packed copies, in bytes, beside the weights themselves.

    Example:
        >>> print(lk.PrepackReport(["0", "2"], {"4": "no product to pack for"}, 2**21))
        lora_kernels: 2 weights packed in 2.0 MiB, 1 left
          left (no product to pack for): 4
    """

    packed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0

    def _headline(self) -> str:
        size = f"{self.nbytes / 2**20:.1f} MiB"
        return f"lora_kernels: {len(self.packed)} weights packed in {size}, {len(self.left)} left"

    def _groups(self) -> list[Group]:
        return grouped("left", self.left)


def prepack_(model: nn.Module, *, backward: bool = True) -> PrepackReport:
    """Pack the frozen weights of a model's adapted layers for faster products on the CPU.

    A packed copy serves as long as its weight does: once that is replaced, moved or changed in
    place, the copy is dropped and the weight itself is used, as `report` says; call this again to
    pack anew. A patched layer's copies come back when it is unmerged. Writes through `weight.data`
    can't be seen: call it again after them. Parameters, state_dict, saving and copying of the model
    are not touched. Results are those of the weight, but for the order of sums. Packed copies serve
    calls that `impl="cpu"` does, in the dtype of the weight: none under an autocast to another one,
    and none inside compiled graphs. `explain` says which "auto" gives it.

    Args:
        model: a model with `LoRALinear` layers, or PEFT layers that `patch_peft` patched.
        backward: also pack Wᵀ for the gradient of x; without it memory is halved.

    Returns:
        A `PrepackReport`; `print(report)` is readable.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no adapted layer. The model is as it was.

    Example:
        >>> model = nn.Sequential(lk.LoRALinear(64, 64), nn.Linear(64, 64))
        >>> report = lk.prepack_(model)
        >>> [*report.packed, *report.left]
        ['0']
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
        calls = vars(layer).get("_lora_kernels_calls")
        if calls is not None:
            calls.lost = calls.repack = None
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

    Example:
        >>> model = nn.Sequential(lk.LoRALinear(64, 64))
        >>> packed = lk.prepack_(model).packed
        >>> lk.unprepack_(model) == len(packed), lk.unprepack_(model)
        (True, 0)
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
    return f"base layer {read}" if isinstance(read, str) else reason_left(read[0]) or read[0]

"""Pack and unpack the frozen weights of a model's adapted layers, for the compiled CPU part."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_kernels.bypass import read_linear
from lora_kernels.checks import is_dtensor, lack_of_memory
from lora_kernels.native import absence
from lora_kernels.operands.onednn import OnednnWeight
from lora_kernels.operands.weight import Dense, Weight
from lora_kernels.summary import Group, Summary, grouped

PACKED_DTYPES = (torch.bfloat16, torch.float32)
_CHANGED = "the weight was replaced, moved or changed; call prepack_ again"


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
        dora = layer._modules.get("lora_magnitude_vector")  # of PEFT's layers an empty dictionary
        weight = "DoRA reads no packed weight" if dora else _weight_to_pack(layer.base_layer)
        if isinstance(weight, str):
            left[path] = weight
            continue
        layer._lora_kernels_packed = OnednnWeight(weight, backward)
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


class PackedLayer(Protocol):
    """A layer that may have a packed weight."""

    _lora_kernels_packed: OnednnWeight | None


def current(layer: PackedLayer, weight: Tensor) -> Weight:
    """Return a layer's weight as a call takes it: its packed one while that holds `weight`."""
    # Another thread may be unpatching the layer.
    packed = getattr(layer, "_lora_kernels_packed", None)
    # Opaque tensors can't be traced: compiled graphs take the weight itself.
    if packed is None or torch.compiler.is_compiling():
        return Dense(weight)
    if packed.holds(weight):
        return packed
    forget(layer, _CHANGED)
    return Dense(weight)


def forget(layer: PackedLayer, reason: str, until_unmerged: bool = False) -> None:
    """Drop the layer's packed weight, if it has one; its record keeps the reason."""
    packed = getattr(layer, "_lora_kernels_packed", None)
    if packed is None:
        return
    layer._lora_kernels_packed = None
    calls = vars(layer).get("_lora_kernels_calls")
    if calls is not None:
        calls.lost, calls.repack = reason, packed.both_ways if until_unmerged else None


def restore(layer: Any, weight: Tensor | str) -> None:
    """Pack the weight again that `forget` dropped until now, or say why it isn't read."""
    calls = vars(layer).get("_lora_kernels_calls")
    if calls is None or calls.repack is None:
        return
    both_ways, calls.repack = calls.repack, None
    calls.lost = weight if isinstance(weight, str) else reason_left(weight)
    if not isinstance(weight, str) and calls.lost is None:
        layer._lora_kernels_packed = OnednnWeight(weight, both_ways)


def state_of_copies(layer: Any, weight: Tensor | None, impl: str | None) -> str | None:
    """Return whether a layer's packed copies are "packed", "unused: ..." or "lost: ...", if any.

    weight: the base layer's as a call reads it, if one can. impl: what its calls run by, where that
    is known.
    """
    packed = getattr(layer, "_lora_kernels_packed", None)
    if packed is None:
        calls = vars(layer).get("_lora_kernels_calls")
        return None if calls is None or calls.lost is None else f"lost: {calls.lost}"
    if weight is None or not packed.holds(weight):
        return f"lost: {_CHANGED}"
    if packed.unused is not None:
        name, dtype = packed.unused
        return f"unused: the last call ran by {name} in {dtype}, the copies are {packed.dtype}"
    if impl is not None and not impl.startswith("cpu"):
        return f"unused: calls run by {impl}"
    return "packed"


def reason_left(weight: Tensor) -> str | None:
    """Return why a weight can't be packed, or None."""
    absent = absence("cpu")
    if absent is not None:
        return f"the compiled CPU part is absent: {absent}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device}, not a CPU"
    if weight.dtype not in PACKED_DTYPES:
        return f"the weight is {weight.dtype}, not bfloat16 or float32"
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN packs no bfloat16 on this processor, which has no AVX512"
    if is_dtensor(weight):
        return "the weight is a DTensor"
    if type(weight) not in (nn.Parameter, Tensor):
        return f"the weight is a {type(weight).__name__}"
    if weight.ndim != 2 or weight.numel() == 0:
        return f"the weight has shape {list(weight.shape)}"
    if weight.requires_grad:
        return "the weight is not frozen"
    lack = lack_of_memory(weight)
    if lack is not None:
        return f"expected {lack}"
    if weight.is_inference():
        return "the weight is an inference tensor, whose changes can't be seen"
    return None

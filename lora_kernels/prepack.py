"""Pack and unpack the frozen weights of a model's adapted layers, for the compiled CPU part."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.bypass import read_linear
from lora_kernels.checks import is_dtensor, lack_of_memory
from lora_kernels.native import absence
from lora_kernels.operands.held import CastWeight
from lora_kernels.operands.onednn import OnednnWeight
from lora_kernels.summary import Group, Summary, grouped

PACKED_DTYPES = (torch.bfloat16, torch.float32)


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
    pack anew. A patched layer's copies come back when it is unmerged. A write through `weight.data`
    is seen if it reaches the first row or column: call this again after another. Parameters,
    state_dict, saving and copying of the model are not touched. Results are those of the weight,
    but for the order of sums. Packed copies serve calls that `impl="cpu"` does, in the dtype of the
    weight: none under an autocast to another one, and none inside compiled graphs. Where
    `cast_weights_` made a 16-bit copy of the weight, that is packed instead. `explain` says which
    "auto" gives it.

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
    packed, left, nbytes = [], {}, 0
    for path, layer in adapted_layers(model):
        cast = _unpacked(layer)
        dora = layer._modules.get("lora_magnitude_vector")  # of PEFT's layers an empty dictionary
        weight = "DoRA reads no packed weight" if dora else _weight_to_pack(layer.base_layer, cast)
        if isinstance(weight, str):
            left[path] = weight
            continue
        copies = OnednnWeight(weight, backward)
        if cast is None:
            layer._lora_kernels_packed = copies
        else:
            cast.packed = copies
        calls = vars(layer).get("_lora_kernels_calls")
        if calls is not None:
            calls.lost = calls.recipe = None
        nbytes += copies.nbytes
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
    layers = [layer for _, layer in _layers_that_hold(model) if _is_packed(layer)]
    for layer in layers:
        _unpacked(layer)
    return len(layers)


def adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers that may hold copies of their weights, with their paths.

    Raises:
        TypeError, ValueError: `model` is no module, or has none.
    """
    layers = _layers_that_hold(model)
    if not layers:
        raise ValueError(
            "model: expected one with LoRALinear layers or patched PEFT layers, got none in "
            f"{type(model).__name__} (call lora_kernels.patch_peft first)"
        )
    return layers


def _layers_that_hold(model: nn.Module) -> list[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    # LoRALinear and a patched PEFT layer alone have the attribute.
    return [(path, m) for path, m in model.named_modules() if hasattr(m, "_lora_kernels_packed")]


def _is_packed(layer: Any) -> bool:
    held = layer._lora_kernels_packed
    return held.packed is not None if isinstance(held, CastWeight) else held is not None


def _unpacked(layer: Any) -> CastWeight | None:
    """Drop a layer's packed copies, and a stale cast one; return the cast copy that it holds."""
    held, read = layer._lora_kernels_packed, read_linear(layer.base_layer)
    if isinstance(held, CastWeight) and not isinstance(read, str) and held.holds(read[0]):
        held.packed = None
        return held
    layer._lora_kernels_packed = None
    return None


def _weight_to_pack(base: nn.Module, cast: CastWeight | None) -> Tensor | str:
    """Return the base layer's weight, or its 16-bit copy, or why that can't be packed."""
    if cast is not None:
        return reason_left(cast.copy) or cast.copy
    read = read_linear(base)
    return f"base layer {read}" if isinstance(read, str) else reason_left(read[0]) or read[0]


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
    return reason_uncopied(weight)


def reason_uncopied(weight: Tensor) -> str | None:
    """Return why a layer can hold no copy of a weight beside it, packed or cast; or None."""
    if is_dtensor(weight):
        return "the weight is a DTensor"
    if type(weight) not in (nn.Parameter, Tensor):
        return f"the weight is a {type(weight).__name__}"
    if weight.is_meta:
        return "the weight is on meta"
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

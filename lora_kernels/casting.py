"""Hold a 16-bit copy of each frozen float32 weight of a model, for autocast."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_kernels.bypass import read_linear
from lora_kernels.operands.held import CastWeight
from lora_kernels.prepack import adapted_layers, reason_uncopied
from lora_kernels.summary import Group, Summary, grouped

CAST_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CastReport(Summary):
    """What `cast_weights_` did: paths of layers with a copy now, of layers left with the reason.

    Attributes:
        cast: paths of layers whose weights have a 16-bit copy.
        left: paths of the others, with the reason.
        nbytes: memory of the copies, in bytes, beside the weights themselves.

    Example:
        >>> print(lk.CastReport(["0", "2"], {"4": "the weight is torch.bfloat16"}, 2**21))
        lora_kernels: 2 weights copied in 2.0 MiB, 1 left
          left (the weight is torch.bfloat16): 4
    """

    cast: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0

    def _headline(self) -> str:
        size = f"{self.nbytes / 2**20:.1f} MiB"
        return f"lora_kernels: {len(self.cast)} weights copied in {size}, {len(self.left)} left"

    def _groups(self) -> list[Group]:
        return grouped("left", self.left)


def cast_weights_(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> CastReport:
    """Make a 16-bit copy of each frozen float32 weight of a model's adapted linear layers.

    Without one every call under autocast casts the weight anew and saves that copy for backward. It
    is better to load the model in 16 bits; this is for one that has to stay in float32. A copy is
    read under an autocast to its dtype, in eager calls; elsewhere the weight itself is. It serves
    as long as its weight does, as a packed one (`prepack_`, which packs the copy where there is
    one): once that is replaced, moved or changed in place, the copy is dropped, as `report` says;
    call this again to copy anew. A patched layer's copy comes back when it is unmerged. A write
    through `weight.data` is seen if it reaches the first row or column, on a GPU not at all: call
    this again after another. Parameters, state_dict, saving and copying of the model are not
    touched.

    Args:
        model: a model with `LoRALinear` layers, or PEFT layers that `patch_peft` patched.
        dtype: torch.bfloat16 or torch.float16, the one that autocast will ask for.

    Returns:
        A `CastReport`; `print(report)` is readable.

    Precision: the copy is the weight rounded once, as autocast rounds it: results are the same.

    Raises:
        TypeError: `model` is no module, or `dtype` is another.
        ValueError: the model has no adapted layer. It is as it was.

    Example:
        >>> model = nn.Sequential(lk.LoRALinear(64, 64), nn.Linear(64, 64))
        >>> lk.cast_weights_(model, torch.bfloat16).cast
        ['0']
    """
    check_cast_dtype(dtype, "dtype")
    cast, left, nbytes = [], {}, 0
    for path, layer in adapted_layers(model):
        read = read_linear(layer.base_layer)
        reason = f"base layer {read}" if isinstance(read, str) else reason_uncast(read[0])
        if isinstance(read, str) or reason is not None:
            left[path] = str(reason)
            continue
        layer._lora_kernels_packed = CastWeight(read[0], dtype)
        calls = vars(layer).get("_lora_kernels_calls")
        if calls is not None:
            calls.lost = calls.recipe = None
        nbytes += layer._lora_kernels_packed.nbytes
        cast.append(path)
    return CastReport(cast, left, nbytes)


def check_cast_dtype(dtype: object, name: str) -> None:
    """Raise TypeError unless autocast may ask for a dtype of 16 bits."""
    if dtype not in CAST_DTYPES:
        raise TypeError(f"{name}: expected torch.bfloat16 or torch.float16, got {dtype!r}")


def reason_uncast(weight: Tensor) -> str | None:
    """Return why a weight gets no 16-bit copy, or None."""
    if weight.dtype != torch.float32:
        return f"the weight is {weight.dtype}, not float32"
    return reason_uncopied(weight)

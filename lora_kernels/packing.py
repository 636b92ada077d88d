"""A frozen weight in oneDNN's own layout, for the compiled CPU part: used while it holds."""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_kernels.checks import is_dtensor, lack_of_memory
from lora_kernels.impl.eager.onednn import parts
from lora_kernels.native import absence
from lora_kernels.ops import backward_op, forward_op

PACKED_DTYPES = (torch.bfloat16, torch.float32)
_CHANGED = "the weight was replaced, moved or changed; call prepack_ again"


class Packed:
    """A weight's packed copies, and the operators that take them.

    The copies are those of one version of one memory: a weight that was replaced, moved or written
    to since is not held any more (writes through `.data` leave no trace), nor one that is trained.
    A copied or unpickled module starts without them.
    """

    def __init__(self, weight: Tensor, backward: bool) -> None:
        # The detached alias shares memory and version counter, and keeps that address from reuse.
        self._weight, self._version = weight.detach(), weight._version
        self.dtype, self.both_ways = weight.dtype, backward
        # Implementation and dtype of the last call, if it read the weight itself.
        self.unused: tuple[str, torch.dtype] | None = None
        copies = _packed(self._weight)
        self.forward: Any = partial(forward_op("cpu"), packed=copies)
        self.backward: Any = backward_op("cpu")
        if backward:
            transposed = _packed(self._weight.t())
            self.backward = partial(self.backward, packed=transposed)
            copies = copies + transposed
        self.nbytes = sum(copy.numel() * copy.element_size() for copy in copies)

    def holds(self, weight: Tensor) -> bool:
        """Whether `weight` is still what was packed."""
        mine = self._weight
        return (
            not weight.requires_grad  # fused optimizers leave no trace in the version
            and weight._version == self._version
            and weight.data_ptr() == mine.data_ptr()
            and weight.stride() == mine.stride()  # `.data` may be the same memory read otherwise
            and weight.shape == mine.shape
        )

    def serves(self, impl: str, dtype: torch.dtype) -> bool:
        """Whether a call by this implementation, in this dtype, reads the copies."""
        read = impl == "cpu" and dtype == self.dtype
        self.unused = None if read else (impl, dtype)
        return read

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def _packed(weight: Tensor) -> list[Tensor]:
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return [reorder(part.contiguous()) for _, part in parts(weight)]


class PackedLayer(Protocol):
    """A layer that may have a packed weight."""

    _lora_kernels_packed: Packed | None


def current(layer: PackedLayer, weight: Tensor) -> Packed | None:
    """Return the layer's packed weight if it still holds `weight`; drop it otherwise."""
    # Another thread may be unpatching the layer.
    packed = getattr(layer, "_lora_kernels_packed", None)
    # Opaque tensors can't be traced: compiled graphs take the weight itself.
    if packed is None or torch.compiler.is_compiling():
        return None
    if packed.holds(weight):
        return packed
    forget(layer, _CHANGED)
    return None


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
        layer._lora_kernels_packed = Packed(weight, both_ways)


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

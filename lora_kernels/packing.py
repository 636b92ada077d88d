"""A frozen weight in oneDNN's own layout, for the compiled CPU part: used while it holds."""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_kernels._onednn import parts
from lora_kernels.ops import backward_op, forward_op


class Packed:
    """A weight's packed copies, and the operators that take them.

    The copies are those of one version of one memory: a weight that was replaced, moved or written
    to since is not held any more (writes through `.data` leave no trace). A copied or unpickled
    module starts without them.
    """

    def __init__(self, weight: Tensor, backward: bool) -> None:
        # The detached alias shares memory and version counter, and keeps that address from reuse.
        self._weight, self._version = weight.detach(), weight._version
        self.dtype = weight.dtype
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
        return weight._version == self._version and weight.data_ptr() == mine.data_ptr()

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
    layer._lora_kernels_packed = None
    return None

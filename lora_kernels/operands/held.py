"""A frozen weight with copies that a layer holds beside it, as long as it is what was copied."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.operands.weight import Dense, Stored, Weight


class Recipe(NamedTuple):
    """How copies of a weight are made again.

    cast: dtype of a cast copy, or None. pack: whether packed copies are for both directions, or for
    forward only; None where nothing is packed.
    """

    cast: torch.dtype | None
    pack: bool | None


class HeldWeight:
    """W and copies of it: those of one version of one memory.

    A weight that was replaced, moved or written to since is not held any more, nor one that is
    trained. A write through `.data`, as PEFT merges, moves no version: on CPUs a row and a column
    are compared, which it reaches as a rule (a BA, a factor, another file's weights). On a GPU to
    compare would wait for it. A copied or unpickled module starts without.
    """

    def __init__(self, weight: Tensor) -> None:
        # The detached alias shares memory and version counter, and keeps that address from reuse.
        self.stored, self._version = weight.detach(), weight._version
        self.shape, self.dtype = weight.shape, weight.dtype
        self._nbytes = self.stored.untyped_storage().nbytes()
        lines = (self.stored[:1], self.stored[:, :1]) if weight.is_cpu else ()
        self._compared = [(line, line.clone()) for line in lines]

    def holds(self, weight: Tensor) -> bool:
        """Whether `weight` is still what was copied."""
        mine = self.stored
        return (
            not weight.requires_grad  # fused optimizers leave no trace in the version
            and not weight.is_inference()  # which has no version
            and weight._version == self._version
            and weight.data_ptr() == mine.data_ptr()
            and weight.stride() == mine.stride()  # `.data` may be the same memory read otherwise
            and weight.shape == mine.shape
            and mine.untyped_storage().nbytes() == self._nbytes  # an emptied one can't be read
            and all(torch.equal(line, known) for line, known in self._compared)
        )

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W."""
        return self.stored if dtype is None else self.stored.to(dtype)

    def as_autocast(self, dtype: torch.dtype) -> Weight:
        """Return W as autocast has it."""
        return Dense(self.stored.to(dtype))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


class CastWeight(HeldWeight):
    """W in float32 and its copy in the dtype that autocast asks for."""

    format, form = "dense", None

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight)
        # An inference tensor couldn't be saved for backward.
        with torch.inference_mode(False):
            self.copy = self.stored.to(dtype)
        # The copy's own copies in oneDNN's layout, set by `prepack_`.
        self.packed: Weight | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the copy, in bytes."""
        return self.copy.nbytes

    def tensors(self, backward: bool) -> Stored:  # noqa: ARG002  the protocol's
        """Return W alone."""
        return self.stored, None

    def as_autocast(self, dtype: torch.dtype) -> Weight:
        """Return W as autocast has it: the copy, where it asks for that dtype."""
        if dtype is self.copy.dtype:
            return Dense(self.copy) if self.packed is None else self.packed
        return super().as_autocast(dtype)

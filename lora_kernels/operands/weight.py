"""The frozen weight of a call, in whichever format it is stored."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# What operators take of a weight besides W or its codes; None of a dense one.
Parts = Sequence[Tensor] | None
Stored = tuple[Tensor, Parts]
Misfit = TypeError | ValueError | None  # an error that says what doesn't fit


class Weight(Protocol):
    """W [N, K] as it is stored; shape and dtype are those of W itself."""

    @property
    def format(self) -> str:
        """A word of `FORMATS`."""

    @property
    def form(self) -> str | None:
        """The word with the format's numbers, as operators take it; None of a dense weight."""

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of W; None where it is decoded to that of x."""

    @property
    def stored(self) -> Tensor:
        """W or its codes: the tensor that is asked for its device, memory and gradient."""

    def tensors(self, backward: bool) -> Stored:
        """Return what the operators of a direction take: W or its codes, and the parts."""

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W itself, in `dtype` or as exactly as the format says it."""

    def as_autocast(self, dtype: torch.dtype) -> "Weight":
        """Return W in the dtype that autocast asks for; codes stay, x decides for them."""


class Dense:
    """W as torch has it; no NamedTuple, which takes twice the time to make."""

    __slots__ = ("stored",)
    format, form = "dense", None

    def __init__(self, stored: Tensor) -> None:
        self.stored = stored

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        return self.stored.dtype

    def tensors(self, backward: bool) -> Stored:  # noqa: ARG002  the protocol's
        """Return W alone."""
        return self.stored, None

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W."""
        stored = self.stored
        return stored if dtype is None or stored.dtype is dtype else stored.to(dtype)

    def as_autocast(self, dtype: torch.dtype) -> "Dense":
        """Return W in that dtype."""
        return Dense(self.decode(dtype))


class QuantizedWeight:
    """A frozen weight as codes and scales, views of what its owner keeps; nothing writes to them.

    `lora_linear` takes one in W's place, and `quantized_weight` makes it of a layer. W is decoded
    to the dtype of x, in forward and in backward.

    Attributes:
        format: "nf4", "fp4", "int8" or "float8".
        form: the word with the format's numbers.
        shape: [N, K].
        stored: the codes.
        parts: the scales, and what else W is made of.
    """

    format: str
    form: str
    shape: torch.Size
    stored: Tensor
    parts: tuple[Tensor, ...]
    dtype = None

    def tensors(self, backward: bool) -> Stored:  # noqa: ARG002  the protocol's
        """Return the codes and the parts."""
        return self.stored, self.parts

    @property
    def nbytes(self) -> int:
        """Memory of the codes and the parts, in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.stored, *self.parts))

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W: a product in float32, rounded once to `dtype`; float32 by default."""
        raise NotImplementedError

    def as_autocast(self, dtype: torch.dtype) -> "QuantizedWeight":  # noqa: ARG002  the protocol's
        """Return the weight itself."""
        return self

    def misfit(self) -> Misfit:
        """Return the error that names what doesn't fit in codes, parts and numbers, or None."""
        raise NotImplementedError

    def __repr__(self) -> str:
        n, k = self.shape
        return f"{type(self).__name__}({self.form!r}, [{n}, {k}], {self.stored.device})"


def numbers_of(form: str, *names: str) -> list[int]:
    """Return the numbers in a form, such as "nf4:64:128:256".

    Raises:
        ValueError: not as many as there are names, or one below 1.
    """
    word, *sizes = form.split(":")
    if len(sizes) != len(names) or not all(text.isdecimal() and int(text) > 0 for text in sizes):
        expected = ":".join((word, *names))
        raise ValueError(f"format: expected {expected}, numbers of at least 1, got {form!r}")
    return [int(text) for text in sizes]

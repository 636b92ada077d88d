"""The frozen weight of a call, in whichever format it is stored."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# What operators take of a weight besides W or its codes; None of a dense one.
Parts = Sequence[Tensor] | None
Stored = tuple[Tensor, Parts]


class Weight(Protocol):
    """W [N, K] as it is stored; shape and dtype are those of W itself."""

    @property
    def format(self) -> str:
        """A word of `FORMATS`."""

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""

    def tensors(self, backward: bool) -> Stored:
        """Return what the operators of a direction take: W or its codes, and the parts."""

    def decode(self) -> Tensor:
        """Return W itself."""


class Dense:
    """W as torch has it; no NamedTuple, which takes twice the time to make."""

    __slots__ = ("matrix",)
    format = "dense"

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        return self.matrix.dtype

    def tensors(self, backward: bool) -> Stored:  # noqa: ARG002  the protocol's
        """Return W alone."""
        return self.matrix, None

    def decode(self) -> Tensor:
        """Return W."""
        return self.matrix


# Each format, and whether W itself is among its tensors: such a weight is dense to whoever doesn't
# know the format.
FORMATS = {"dense": True, "onednn": True}


def weight_of(form: str | None, weight: Tensor, parts: Parts) -> Weight:
    """Return the weight that an operator in plain torch was given.

    Raises:
        ValueError: no such format, or parts that it doesn't have.
    """
    if form is not None and form not in FORMATS:
        known = ", ".join(map(repr, FORMATS))
        raise ValueError(f"format: expected one of {known}, got {form!r}")
    if parts is not None and form in (None, "dense"):
        raise ValueError("parts: expected none of a dense weight, got some")
    return Dense(weight)


def format_served(form: str, known: tuple[str, ...]) -> str | None:
    """Return the format in which who knows `known` reads a weight, or None."""
    if form in known:
        return form
    return "dense" if "dense" in known and FORMATS.get(form, False) else None

"""The table of weight formats: what an operator was given, read as a weight."""

from collections.abc import Callable

from torch import Tensor

from lora_kernels.operands.codebook import CodebookWeight
from lora_kernels.operands.scaled import ScaledWeight
from lora_kernels.operands.weight import Dense, Parts, QuantizedWeight, Weight

# Each format, and whether W itself is among its tensors: such a weight is dense to whoever doesn't
# know the format.
FORMATS = {
    "dense": True,
    "onednn": True,
    "nf4": False,
    "fp4": False,
    "int8": False,
    "float8": False,
}
# How codes and parts are read where W isn't among them.
_READ: dict[str, Callable[[str, Tensor, tuple[Tensor, ...]], QuantizedWeight]] = {
    "nf4": CodebookWeight.of_form,
    "fp4": CodebookWeight.of_form,
    "int8": ScaledWeight.of_form,
    "float8": ScaledWeight.of_form,
}


def weight_of(form: str | None, weight: Tensor, parts: Parts) -> Weight:
    """Return the weight that an operator in plain torch was given.

    Raises:
        ValueError: no such format, numbers that it hasn't, or parts that it doesn't have.
    """
    if form is None:
        word = "dense"
    else:
        word = form.partition(":")[0]
        if word not in FORMATS or (FORMATS[word] and word != form):
            known = ", ".join(map(repr, FORMATS))
            raise ValueError(f"format: expected one of {known}, got {form!r}")
    if parts is not None and word == "dense":
        raise ValueError("parts: expected none of a dense weight, got some")
    if word in _READ:
        assert form is not None
        return _READ[word](form, weight, tuple(parts or ()))
    return Dense(weight)


def format_served(form: str, known: tuple[str, ...]) -> str | None:
    """Return the format in which who knows `known` reads a weight, or None."""
    if form in known:
        return form
    return "dense" if "dense" in known and FORMATS.get(form, False) else None

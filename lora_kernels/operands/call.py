"""A call's tensors by name: what goes from the public function to the kernel."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_dynamo_compiling

from lora_kernels.operands.dropout import Dropout
from lora_kernels.operands.formats import weight_of
from lora_kernels.operands.weight import Dense, Parts, Weight

AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # float64 is left as it is


def scaling_for(scaling: Any, device: torch.device) -> Any:
    """Return a checked scaling as kernels on `device` take it: a number, or a tensor there.

    A tensor on the CPU is read, as torch's own operators do beside a GPU's; nobody waits for a GPU.

    Raises:
        ValueError: a tensor that is neither on `device` nor on the CPU.
    """
    if not isinstance(scaling, Tensor) or scaling.device == device:
        return scaling
    if scaling.device.type != "cpu":
        raise ValueError(
            f"scaling: expected a tensor on {device}, as x is, or on the CPU, got one on "
            f"{scaling.device}"
        )
    # What is traced has no number yet; one for each group has several.
    several = scaling.ndim > 0 or torch.compiler.is_compiling()
    return scaling.to(device) if several else float(scaling)


class Adapter(NamedTuple):
    """A [R, K], B [N, R] and the factor on their product: a number or a 0-dim tensor."""

    a: Tensor
    b: Tensor
    scaling: float | Tensor

    def flat_scaling(self) -> tuple[Tensor | None, float]:
        """Return the factor as operators take it: a tensor, or a number."""
        scaling = scaling_for(self.scaling, self.a.device)
        if is_dynamo_compiling():
            scaling = _of_any_value(scaling, self.a)
        return (scaling, 1.0) if isinstance(scaling, Tensor) else (None, float(scaling))


class LinearCall(NamedTuple):
    """y = x Wᵀ + bias + scaling · D(x) Aᵀ Bᵀ, but for x; `dropout` is None where D is nothing."""

    weight: Weight
    adapter: Adapter
    bias: Tensor | None
    dropout: Dropout | None

    def cast(self, dtype: torch.dtype) -> "LinearCall":
        """Return the call with W and bias as autocast has them; codes stay, x decides for them."""
        weight, adapter, bias, dropout = self
        if weight.dtype != dtype and weight.dtype in AUTOCAST_DTYPES:
            weight = weight.as_autocast(dtype)
        return LinearCall(weight, adapter, as_autocast(bias, dtype), dropout)

    def flat(self) -> tuple[Any, ...]:
        """Return what a forward operator takes after x."""
        weight, (a, b, scaling), bias, dropout = self
        plain = dropout is None and type(weight) is Dense and type(scaling) is float
        if plain and not is_dynamo_compiling():  # in half the time
            return weight.stored, None, None, a, b, bias, None, 0, None, scaling
        w, parts = weight.tensors(False)
        form = weight.form
        seed, threshold = (None, 0) if dropout is None else dropout
        return w, parts, form, a, b, bias, seed, threshold, *self.adapter.flat_scaling()

    def flat_backward(self) -> tuple[Any, ...]:
        """Return what a backward operator takes between xa and the gradients wanted."""
        parts = self.weight.tensors(True)[1]
        w, _, form, a, b, _, *others = self.flat()
        return w, parts, form, a, b, *others


class Wanted(NamedTuple):
    """Which gradients a backward call is asked for."""

    dx: bool
    da: bool
    db: bool
    dbias: bool


class Gradients(NamedTuple):
    """The gradients of a call, None where not wanted."""

    dx: Tensor | None
    da: Tensor | None
    db: Tensor | None
    dbias: Tensor | None


def call_of(
    weight: Tensor, parts: Parts, form: str | None, a: Tensor, b: Tensor, *others: Any
) -> LinearCall:
    """Return the call that a forward operator was given, by its arguments after x."""
    bias, seed, threshold, tensor, number = others
    adapter = Adapter(a, b, number if tensor is None else tensor)
    dropout = None if seed is None or threshold == 0 else Dropout(seed, threshold)
    return LinearCall(weight_of(form, weight, parts), adapter, bias, dropout)


def _of_any_value(scaling: float | Tensor, like: Tensor) -> float | Tensor:
    """Return a number that torch.compile leaves open as a tensor of `like`'s device.

    An operator's number is compiled in: a schedule of scaling would compile at each step.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value

    if isinstance(scaling, Tensor) or has_static_value(scaling):
        return scaling
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.ones((), dtype=dtype, device=like.device) * scaling


def as_autocast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a tensor, if there is one, as autocast to `dtype` has it."""
    return t if t is None or t.dtype not in AUTOCAST_DTYPES else t.to(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast asks of x's device; None outside autocast and for float64."""
    if not is_dynamo_compiling() and not _is_any_autocast_enabled():
        return None
    if not isinstance(x, Tensor) or x.dtype == torch.float64:
        return None
    device = x.device.type
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):
        return None
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)

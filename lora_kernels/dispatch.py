"""Which implementation serves a call, or the reason why one does not."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from lora_kernels.impl import executor
from lora_kernels.impl.cpu import support as cpu
from lora_kernels.impl.cuda import support as cuda
from lora_kernels.impl.eager import support as eager
from lora_kernels.impl.reference import support as reference
from lora_kernels.impl.triton import support as triton
from lora_kernels.operands.request import Request
from lora_kernels.ops import backward_op, forward_op


@dataclass(frozen=True)
class Implementation:
    """One way to compute the layer: its operators, and `refuse`, a reason or None for a request.

    ops: what it has, with the formats of W.
    """

    name: str
    summary: str
    ops: dict[str, tuple[str, ...]]
    refuse: Callable[[Request], str | None]
    forward: Any = field(init=False, repr=False)
    backward: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward", forward_op(self.name))
        object.__setattr__(self, "backward", backward_op(self.name))


# In the order in which "auto" tries them.
IMPLEMENTATIONS = tuple(
    Implementation(name, support.SUMMARY, support.OPS, support.refuse)
    for name, support in (
        ("triton", triton),
        ("cuda", cuda),
        ("cpu", cpu),
        ("eager", eager),
        ("reference", reference),
    )
)
_BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
CHOICES = ("auto", *_BY_NAME)


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is "auto" or names an implementation of this version."""
    if impl not in CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, CHOICES))}, got {impl!r}")


def choose(
    impl: str, device: torch.device, dtype: torch.dtype, rank: int, dropout: bool
) -> Implementation:
    """Return the named implementation, or with "auto" the first that accepts the request.

    Raises:
        ValueError: `impl` is unknown, or refuses the request; an explicit choice never falls back.
    """
    if torch.compiler.is_compiling():  # folds the choice, but can't call a cached function
        return _choose(impl, Request(device, dtype, rank, dropout))
    return _cached_choice(impl, device, dtype, rank, dropout, executor.replaced())


@cache
def _cached_choice(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    rank: int,
    dropout: bool,
    _replaced: str | None,
) -> Implementation:
    """Choose once for a kind of call; the last is all that a choice depends on besides."""
    return _choose(impl, Request(device, dtype, rank, dropout))


def _choose(impl: str, request: Request) -> Implementation:
    if impl == "auto":
        for implementation in IMPLEMENTATIONS:
            if implementation.refuse(request) is None:
                return implementation
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals(request).items())
        raise ValueError(f"impl: no implementation serves this call ({reasons})")
    check_impl(impl)
    reason = refusal(impl, request)
    if reason is not None:
        raise ValueError(f"impl: {impl!r} can't serve this call: {reason}")
    return _BY_NAME[impl]


def refusal(impl: str, request: Request) -> str | None:
    """Return why a named implementation can't serve the request, or None."""
    return _BY_NAME[impl].refuse(request)


def slower_than_peft(request: Request) -> str | None:
    """Return why PEFT's own operators serve a call faster than "auto" would, or None.

    Without a kernel on an accelerator the mask is drawn by torch's operators, thousands of them for
    a large x. A named implementation still serves.
    """
    if not request.dropout or request.device.type in ("cpu", "meta"):
        return None
    if torch.compiler.is_compiling():  # can't call a cached function
        return _without_kernel(request)
    return _cached_without_kernel(request, executor.replaced())


@cache
def _cached_without_kernel(request: Request, _replaced: str | None) -> str | None:
    return _without_kernel(request)


def _without_kernel(request: Request) -> str | None:
    reasons = refusals(request)
    if any(name not in reasons for name in ("triton", "cuda")):
        return None
    return f"dropout without a kernel (triton {reasons['triton']}; cuda {reasons['cuda']})"


def refusals(request: Request) -> dict[str, str]:
    """Return the reason of each implementation that refuses the request."""
    reasons = {i.name: i.refuse(request) for i in IMPLEMENTATIONS}
    return {name: reason for name, reason in reasons.items() if reason is not None}

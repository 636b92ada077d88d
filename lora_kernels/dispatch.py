"""Which implementation serves a call, or the reason why one does not."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lora_kernels.ops import backward_op, forward_op


class Problem(NamedTuple):
    """What an implementation may ask about a call before it accepts it."""

    device: str  # torch.device.type
    dtype: torch.dtype  # of x, W, y
    rank: int
    dropout: bool


def _needs_data(problem: Problem) -> str | None:
    if problem.device == "meta":
        return "a meta tensor holds no data to compute with"
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute the layer: its operators, and `refuse`, a reason or None for a problem."""

    name: str
    summary: str
    refuse: Callable[[Problem], str | None]
    forward: Any = field(init=False, repr=False)
    backward: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward", forward_op(self.name))
        object.__setattr__(self, "backward", backward_op(self.name))


# In the order in which "auto" tries them.
IMPLEMENTATIONS = (
    Implementation("eager", "few, in-place ATen calls, any device", _needs_data),
    Implementation("reference", "plain torch, the definition of right, any device", _needs_data),
)
_BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
CHOICES = ("auto", *_BY_NAME)


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is "auto" or names an implementation of this version."""
    if impl not in CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, CHOICES))}, got {impl!r}")


def choose(impl: str, problem: Problem) -> Implementation:
    """Return the named implementation, or with "auto" the first that accepts the problem.

    Raises:
        ValueError: `impl` is unknown, or refuses the problem; an explicit choice never falls back.
    """
    if impl == "auto":
        for implementation in IMPLEMENTATIONS:
            if implementation.refuse(problem) is None:
                return implementation
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals(problem).items())
        raise ValueError(f"impl: no implementation serves this call ({reasons})")
    check_impl(impl)
    implementation = _BY_NAME[impl]
    reason = implementation.refuse(problem)
    if reason is not None:
        raise ValueError(f"impl: {impl!r} can't serve this call: {reason}")
    return implementation


def refusals(problem: Problem) -> dict[str, str]:
    """Return the reason of each implementation that refuses the problem."""
    reasons = {i.name: i.refuse(problem) for i in IMPLEMENTATIONS}
    return {name: reason for name, reason in reasons.items() if reason is not None}

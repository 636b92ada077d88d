"""Which implementation serves a call, or the reason why one does not."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lora_kernels.impl import executor
from lora_kernels.impl.cpu import support as cpu
from lora_kernels.impl.cuda import support as cuda
from lora_kernels.impl.eager import support as eager
from lora_kernels.impl.reference import support as reference
from lora_kernels.impl.triton import support as triton
from lora_kernels.impl.triton.plan.config import padded_rank
from lora_kernels.operands.request import Asked, Request


@dataclass(frozen=True)
class Implementation:
    """One way to compute: `ops`, with the formats of W, and `refuse`, a reason or None."""

    name: str
    summary: str
    ops: dict[str, tuple[str, ...]]
    refuse: Callable[[Request], str | None]


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
# Up to so many rows PEFT's launches with 16-bit adapters took less time on an H200 than each of our
# plans: .050 ms of .061 at 16, .093 of .116 at 512; at 2,048 as much (docs/facts/gpu.md).
FEW_ROWS = 512


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is "auto" or names an implementation of this version."""
    if impl not in CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, CHOICES))}, got {impl!r}")


def check_plain(impl: str, *, exported: bool = False) -> None:
    """Raise ValueError unless `impl` may be torch's own operators, by the reference's formulas.

    exported: whether that is how the op is exported, too.
    """
    check_impl(impl)
    if impl not in ("auto", "reference"):
        raise ValueError(
            f"impl: {impl!r} can't serve this call: inside torch.func transforms, forward-mode "
            f'differentiation, traces{", exports" if exported else ""} and FLOP counts "auto" and '
            '"reference" compute by torch\'s own operators'
        )


def preferred(x: Tensor, weight: Tensor, dropout: bool) -> str:
    """Return "eager" in place of "auto" where kernels would copy W at each call.

    Those of GPUs read W by rows; torch's products read it as it lies. A mask drawn by torch's
    operators costs more than the copy.
    """
    if dropout or x.is_cpu or x.is_meta:
        return "auto"
    return "eager" if weight.stride(0) == 1 != weight.stride(1) else "auto"


def preferred_of_groups(x: Tensor, rank: int, dropout: bool) -> str:
    """Return "eager" in place of "auto" where the like of a GPU's kernel was once wrong on a GPU.

    One launch of a linear layer was, backward, with dropout or a rank that tiles pad; what was
    mended since hasn't run on one (docs/facts/gpu.md).
    """
    doubted = dropout or rank != padded_rank(rank)
    return "eager" if doubted and x.device.type == "cuda" else "auto"


def unproven(impl: str, request: Request) -> str | None:
    """Return why "auto" leaves a request to others that an implementation serves, or None.

    The compiled CUDA part's kernels that decode W haven't run on a GPU: there they serve by name.
    """
    if impl != "cuda" or request.device.type != "cuda" or request.format not in ("nf4", "fp4"):
        return None
    return f"its kernels for {request.format} haven't run on a GPU: by name alone"


def passed_over(request: Request) -> dict[str, str]:
    """Return why "auto" passes over each implementation that refuses a request, or is unproven."""
    reasons = {i.name: i.refuse(request) or unproven(i.name, request) for i in IMPLEMENTATIONS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def choose(impl: str, asked: Asked) -> Implementation:
    """Return the named implementation, or with "auto" the first that accepts the request.

    Raises:
        ValueError: `impl` is unknown, or refuses the request; an explicit choice never falls back.
    """
    if torch.compiler.is_compiling():  # folds the choice, but can't call a cached function
        return _choose(impl, Request(*asked))
    return _cached_choice(impl, asked, executor.of_context())


@cache
def _cached_choice(impl: str, asked: Asked, _replaced: str | None) -> Implementation:
    """Choose once for a kind of call; the last is all that a choice depends on besides."""
    return _choose(impl, Request(*asked))


def _choose(impl: str, request: Request) -> Implementation:
    if impl == "auto":
        for each in IMPLEMENTATIONS:
            if each.refuse(request) is None and unproven(each.name, request) is None:
                return each
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over(request).items())
        raise ValueError(f"impl: no implementation serves this call ({reasons})")
    check_impl(impl)
    reason = refusal(impl, request)
    if reason is not None:
        raise ValueError(f"impl: {impl!r} can't serve this call: {reason}")
    return _BY_NAME[impl]


def has_op(impl: str, op: str) -> bool:
    """Whether a named implementation computes an op at all; "auto" does."""
    return impl == "auto" or op in _BY_NAME[impl].ops


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


def few_rows_slower_than_peft(x: Tensor, dtype: torch.dtype, adapters: torch.dtype) -> str | None:
    """Return why PEFT's operators serve so few rows faster than "auto" would, or None.

    dtype: in which a dense linear layer computes; adapters: of lora_A. PEFT's own are float32
    unless it is told otherwise, and take it more launches.
    """
    if x.device.type in ("cpu", "meta") or dtype.itemsize != 2:
        return None
    if not dtype == adapters == x.dtype or x.numel() > FEW_ROWS * x.shape[-1]:
        return None
    return f"at most {FEW_ROWS} rows with 16-bit adapters, which PEFT's launches compute faster"


def _without_kernel(request: Request) -> str | None:
    reasons = passed_over(request)
    if any(name not in reasons for name in ("triton", "cuda")):
        return None
    return f"dropout without a kernel (triton {reasons['triton']}; cuda {reasons['cuda']})"

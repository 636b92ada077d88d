"""Which implementation takes a call, and why not another: `explain`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor

from lora_kernels.checks import (
    check_call,
    check_dropout_p,
    check_magnitude,
    check_scaling,
    check_seed,
)
from lora_kernels.dispatch import (
    IMPLEMENTATIONS,
    check_impl,
    few_rows_slower_than_peft,
    passed_over,
    preferred,
    preferred_of_groups,
    slower_than_peft,
)
from lora_kernels.impl.eager import grouped_mm
from lora_kernels.impl.triton import launch
from lora_kernels.impl.triton.plan.config import problem_of
from lora_kernels.impl.triton.plan.plan import dora_plan
from lora_kernels.operands.call import Adapter, LinearCall, autocast_dtype
from lora_kernels.operands.dropout import drop_threshold
from lora_kernels.operands.embedding import NO_PADDING, EmbeddingCall
from lora_kernels.operands.grouped import GroupedCall, Groups
from lora_kernels.operands.request import Request
from lora_kernels.operands.weight import Dense, QuantizedWeight, Weight
from lora_kernels.ops.conv import geometry_of, lora_conv1d, lora_conv2d, lora_conv3d, op_of
from lora_kernels.ops.conv_operators import check as check_conv
from lora_kernels.ops.dora import lora_dora_linear
from lora_kernels.ops.embedding import check as check_embedding
from lora_kernels.ops.embedding import lora_embedding, row_of, scale_tensor
from lora_kernels.ops.grouped import grouped_lora_linear
from lora_kernels.ops.grouped_checks import check as check_grouped
from lora_kernels.ops.grouped_checks import check_scaling as check_grouped_scaling
from lora_kernels.ops.linear import lora_linear


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the implementation that "auto" takes, and why others do not serve.

    Attributes:
        choice: name of the implementation, or None where none serves the call.
        reasons: for every other implementation the reason why it isn't taken.
        plans: how "triton" would run forward and backward, with the time predicted (or measured by
            `tune`), and the times predicted of the frozen layer, PEFT's launches, the library plan
            and one launch; empty for others.
        peft: why "auto" of a patched layer keeps PEFT's forward in such a call; None where it
            doesn't.
        format: of the weight, such as "nf4".

    Example:
        >>> print(lk.Explanation("eager", {"triton": "serves CUDA devices, got cpu"}))
        auto -> eager
          triton: serves CUDA devices, got cpu
    """

    choice: str | None
    reasons: dict[str, str]
    plans: dict[str, str] = field(default_factory=dict)
    peft: str | None = None
    format: str = "dense"

    def __str__(self) -> str:
        of = "" if self.format == "dense" else f", weight in {self.format}"
        lines = [f"auto -> {self.choice or 'none'}{of}"]
        if self.peft is not None:
            lines.append(f"  in a patched layer PEFT's forward: {self.peft}")
        lines += [f"  {name}: {plan}" for name, plan in self.plans.items()]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(*arguments: Any, **named: Any) -> Explanation:
    """Say which implementation a function of this package takes for a call; nothing is computed.

    Args:
        arguments: the function (`lora_linear`, which may be left out, `lora_dora_linear`,
            `lora_embedding`, `lora_conv1d`, 2d or 3d, `grouped_lora_linear`), and what it would be
            given.
        named: the same by name. `impl` is checked only: the choice reported is that of "auto".

    Returns:
        An `Explanation`: `choice`, `reasons`, a sentence for every other implementation, `plans`,
        and `peft`.

    Raises:
        TypeError, ValueError: as the function for bad arguments; an implementation's refusal is
            reported, not raised.

    Example:
        >>> x, weight = torch.ones(1, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
        >>> lora_A, lora_B = torch.ones(1, 3), torch.ones(3, 1)
        >>> lk.explain(lk.lora_linear, x, weight, lora_A, lora_B).choice
        'eager'
    """
    if not arguments or not callable(arguments[0]):
        arguments = (lora_linear, *arguments)
    function, *positional = arguments
    read = next((reader for known, reader in _READERS if known is function), None)
    if read is None:
        known = ", ".join(each.__name__ for each, _ in _READERS)
        raise TypeError(f"function: expected one of {known}, got {function!r}")
    bound = signature(function).bind(*positional, **named)
    bound.apply_defaults()
    check_impl(bound.arguments["impl"])
    x, weight, request = read(bound.arguments)
    reasons = passed_over(request)
    names = [i.name for i in IMPLEMENTATIONS]
    linear = request.op == "lora_linear" and request.format == "dense"
    first = preferred(x, weight.stored, request.dropout) if linear else "auto"
    if function is grouped_lora_linear:
        first = preferred_of_groups(x, request.rank, request.dropout)
        first = "eager" if _by_grouped_mm(bound.arguments) else first
    if first != "auto":
        names.insert(0, first)
    choice = next((name for name in names if name not in reasons), None)
    for implementation in IMPLEMENTATIONS:
        if implementation.name not in (choice, *reasons):
            reasons[implementation.name] = f"serves the call too; {choice} comes first"
    planned = choice == "triton" and request.op in ("lora_linear", "lora_dora_linear")
    plans = _triton_plans(x, weight, request) if planned else {}
    peft = slower_than_peft(request)
    if linear and peft is None:
        peft = few_rows_slower_than_peft(x, request.dtype, bound.arguments["lora_A"].dtype)
    return Explanation(choice, reasons, plans, peft, request.format)


# What a call asks for: x or ids, the weight, the request.
_Read = tuple[Tensor, Weight, Request]


def _linear(given: dict[str, Any]) -> _Read:
    """Read and check the arguments of `lora_linear`."""
    x, weight, lora_A, scaling = (given[name] for name in ("x", "weight", "lora_A", "scaling"))
    cast = autocast_dtype(x)
    read = weight if isinstance(weight, QuantizedWeight) else Dense(weight)
    call = LinearCall(read, Adapter(lora_A, given["lora_B"], scaling), given["bias"], None)
    check_call(x, call, cast=cast)
    check_scaling(scaling)
    dropout, rank = _drops(given, x), lora_A.shape[0]
    return x, read, Request("lora_linear", x.device, cast or x.dtype, rank, dropout, read.format)


def _dora(given: dict[str, Any]) -> _Read:
    """Read and check the arguments of `lora_dora_linear`."""
    if isinstance(given["weight"], QuantizedWeight):
        raise TypeError("weight: expected a Tensor beside a magnitude, got a QuantizedWeight")
    x, weight, request = _linear(given)
    check_magnitude(given["magnitude"], x, weight.shape[0])
    return x, weight, request._replace(op="lora_dora_linear")


def _conv(dims: int, given: dict[str, Any]) -> _Read:
    """Read and check the arguments of a convolution in `dims` dimensions."""
    x, weight, lora_A, scaling = (given[name] for name in ("x", "weight", "lora_A", "scaling"))
    check_scaling(scaling)
    call = LinearCall(Dense(weight), Adapter(lora_A, given["lora_B"], scaling), given["bias"], None)
    kernel = tuple(getattr(weight, "shape", ()))[2:]
    geometry = geometry_of(dims, given["stride"], given["padding"], given["groups"], kernel)
    x = x[None] if isinstance(x, Tensor) and x.ndim == dims + 1 else x
    cast = autocast_dtype(x)
    check_conv(x, call, geometry, cast)
    op, dtype, rank = op_of(x, call, geometry), cast or x.dtype, lora_A.shape[0]
    read = Dense(weight.flatten(1)) if op == "lora_linear" else call.weight
    return x, read, Request(op, x.device, dtype, rank, _drops(given, x))


def _embedding(given: dict[str, Any]) -> _Read:
    """Read and check the arguments of `lora_embedding`."""
    ids, weight, scaling = (given[name] for name in ("ids", "weight", "scaling"))
    a, b = given["lora_embedding_A"], given["lora_embedding_B"]
    check_scaling(scaling)
    check_embedding(ids, EmbeddingCall(Dense(weight), Adapter(a, b, scaling), NO_PADDING, None))
    row_of(given["padding_idx"], weight.shape[0])
    if given["embed_scale"] is not None:
        scale_tensor(given["embed_scale"], weight)
    request = Request("lora_embedding", ids.device, weight.dtype, len(a), False)
    return ids, Dense(weight), request


def _grouped(given: dict[str, Any]) -> _Read:
    """Read and check the arguments of `grouped_lora_linear`."""
    x, weight = given["x"], given["weight"]
    check_grouped_scaling(given["scaling"])
    check_grouped(x, _grouped_call(given))
    rank, dropout = given["lora_A"].shape[1], _drops(given, x)
    return x, Dense(weight), Request("grouped_lora_linear", x.device, x.dtype, rank, dropout)


def _grouped_call(given: dict[str, Any]) -> GroupedCall:
    groups = Groups(*(given[name] for name in Groups._fields))
    adapter = Adapter(*(given[name] for name in ("lora_A", "lora_B", "scaling")))
    return GroupedCall(given["weight"], adapter, given["bias"], groups, None, len(given["x"]))


def _by_grouped_mm(given: dict[str, Any]) -> bool:
    """Whether "auto" prefers torch's grouped_mm to kernels of this package."""
    return grouped_mm.serves(given["x"], _grouped_call(given))


def _drops(given: dict[str, Any], x: Tensor) -> bool:
    """Check what dropout takes; return whether any of it is applied."""
    check_dropout_p(given["dropout_p"])
    check_seed(given["seed"], x.device)
    return bool(given["training"]) and drop_threshold(given["dropout_p"]) > 0


_READERS: tuple[tuple[Callable[..., Tensor], Callable[[dict[str, Any]], _Read]], ...] = (
    (lora_linear, _linear),
    (lora_dora_linear, _dora),
    (lora_embedding, _embedding),
    (grouped_lora_linear, _grouped),
    (lora_conv1d, partial(_conv, 1)),
    (lora_conv2d, partial(_conv, 2)),
    (lora_conv3d, partial(_conv, 3)),
)


def _triton_plans(x: Tensor, weight: Weight, request: Request) -> dict[str, str]:
    if request.rank == 0:
        return {}  # the base product alone
    rows = x.reshape(-1, weight.shape[1])
    read = weight if isinstance(weight, QuantizedWeight) else weight.stored
    layer = problem_of(rows, read, rows.new_empty(request.rank, 0), request.dropout)
    dora = request.op == "lora_dora_linear"
    layer = layer._replace(m=max(layer.m, 1), bits=request.dtype.itemsize * 8, gain=dora)
    executor = launch.current()
    device = executor.device(x)
    plans = {}
    for name, each in (("forward", layer), ("backward", layer._replace(backward=True))):
        plan = executor.plan(each, device)
        plans[name] = f"DoRA by {dora_plan(plan, each, device)}" if dora else str(plan)
    return plans

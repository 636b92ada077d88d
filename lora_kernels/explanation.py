"""Which implementation takes a call, and why not another: `explain`."""

from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from torch import Tensor

from lora_kernels.checks import check_call, check_dropout_p, check_scaling, check_seed
from lora_kernels.dispatch import (
    IMPLEMENTATIONS,
    check_impl,
    preferred,
    refusals,
    slower_than_peft,
)
from lora_kernels.impl.triton import launch
from lora_kernels.impl.triton.plan.config import problem_of
from lora_kernels.operands.call import Adapter, LinearCall, autocast_dtype
from lora_kernels.operands.dropout import drop_threshold
from lora_kernels.operands.request import Request
from lora_kernels.operands.weight import Dense, QuantizedWeight, Weight
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
        arguments: the function, `lora_linear` where it is left out, and what it would be given.
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
    if function is not lora_linear:
        raise TypeError(f"function: expected lora_linear, got {function!r}")
    bound = signature(function).bind(*positional, **named)
    bound.apply_defaults()
    given = bound.arguments
    x, weight, lora_A, scaling = (given[name] for name in ("x", "weight", "lora_A", "scaling"))
    cast = autocast_dtype(x)
    weight = weight if isinstance(weight, QuantizedWeight) else Dense(weight)
    call = LinearCall(weight, Adapter(lora_A, given["lora_B"], scaling), given["bias"], None)
    check_call(x, call, cast=cast)
    check_scaling(scaling)
    check_dropout_p(given["dropout_p"])
    check_seed(given["seed"], x.device)
    check_impl(given["impl"])
    dropout = given["training"] and drop_threshold(given["dropout_p"]) > 0
    dtype, form = cast or x.dtype, weight.format
    request = Request("lora_linear", x.device, dtype, lora_A.shape[0], dropout, form)
    reasons = refusals(request)
    names = [i.name for i in IMPLEMENTATIONS]
    first = preferred(x, weight.stored, dropout) if form == "dense" else "auto"
    if first != "auto":
        names.insert(0, first)
    choice = next((name for name in names if name not in reasons), None)
    for implementation in IMPLEMENTATIONS:
        if implementation.name not in (choice, *reasons):
            reasons[implementation.name] = f"serves the call too; {choice} comes first"
    plans = _triton_plans(x, weight, request) if choice == "triton" else {}
    return Explanation(choice, reasons, plans, slower_than_peft(request), form)


def _triton_plans(x: Tensor, weight: Weight, request: Request) -> dict[str, str]:
    rows = x.reshape(-1, weight.shape[1])
    layer = problem_of(rows, weight.stored, rows.new_empty(request.rank, 0), request.dropout)
    layer = layer._replace(m=max(layer.m, 1), bits=request.dtype.itemsize * 8)
    executor = launch.current()
    device = executor.device(x)
    both = {"forward": layer, "backward": layer._replace(backward=True)}
    return {name: str(executor.plan(each, device)) for name, each in both.items()}

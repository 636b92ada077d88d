"""`mixed_lora_linear`: rows of one layer, each with an adapter of its own; PEFT's mixed batches.

It has operators and `run`, no public function: `adapter_batch` and `adapter_names` lead here. The
adapters' factors are a list, read where they lie: to stack those of 16 adapters took a third of a
call of few rows (2026-11-30, Zen 3).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.checks import check_memory, check_shape
from lora_kernels.dispatch import IMPLEMENTATIONS, check_plain, choose, has_op
from lora_kernels.impl.reference import mixed as reference
from lora_kernels.operands.call import Wanted
from lora_kernels.operands.mixed import MixedCall, MixedGradients, mixed_call_of
from lora_kernels.operands.precision import ranged
from lora_kernels.ops.grouped_checks import check_tensors
from lora_kernels.ops.linear_gradients import (
    none_of,
    saved_tensors,
    see_missing_gradients,
    unsaved_x,
)
from lora_kernels.registration import (
    Direction,
    Operators,
    below_autograd,
    is_recorded,
    operators,
    register,
)
from lora_kernels.transforms import backward_needs_plain_torch, needs_plain_torch

OP = "mixed_lora_linear"
_CALL = (
    "Tensor weight, Tensor[] lora_A, Tensor[] lora_B, Tensor scalings, Tensor owners, "
    "Tensor? seed, int threshold"
)
_FORWARD = f"(Tensor x, Tensor? bias, {_CALL}) -> (Tensor y, Tensor xa)"
_BACKWARD = (
    f"(Tensor dy, Tensor? x, Tensor? xa, {_CALL}, bool[4] wanted) -> "
    "(Tensor dx, Tensor[] da, Tensor[] db, Tensor dbias)"
)


def check(v: Any, call: MixedCall, name: str = "x") -> None:
    """Check the tensors of a call beside x [M, K] or, by its name, dy [M, N] against each other.

    Raises:
        TypeError, ValueError: an argument doesn't fit the others.
    """
    weight, bias = call.weight, call.bias
    given: list[tuple[str, Any, int]] = [(name, v, 2), ("weight", weight, 2)]
    given += [("lora_A", a, 2) for a in call.a] + [("lora_B", b, 2) for b in call.b]
    check_tensors(v, given if bias is None else [*given, ("bias", bias, 1)], name)
    n, k = weight.shape
    if v.shape[1] != (k if name == "x" else n):
        expected = f"[N, {v.shape[1]}]" if name == "x" else f"[{v.shape[1]}, K]"
        raise ValueError(
            f"weight: expected shape {expected} beside {name} of shape {list(v.shape)}, got "
            f"{[n, k]}"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias: expected shape {[n]}, got {list(bias.shape)}")
    _check_adapters(v, call)


def _check_adapters(v: Tensor, call: MixedCall) -> None:
    (n, k), count = call.weight.shape, len(call.a)
    if len(call.b) != count:
        raise ValueError(f"lora_B: expected {count} tensors, got {len(call.b)}")
    for a, b in zip(call.a, call.b, strict=True):
        if a.shape[0] < 1 or a.shape[1] != k or b.shape != (n, a.shape[0]):
            raise ValueError(
                f"lora_A, lora_B: expected shapes [R, {k}] and [{n}, R] of one R, at least 1, got "
                f"{list(a.shape)} and {list(b.shape)}"
            )
    if call.scalings.shape != (count,) or call.scalings.dtype != torch.float64:
        raise ValueError(
            f"scalings: expected {count} numbers of float64, got shape "
            f"{list(call.scalings.shape)}, {call.scalings.dtype}"
        )
    owners = call.owners
    if owners.dtype != torch.int32 or owners.ndim != 1:
        raise TypeError(f"owners: expected int32 [samples], got {owners.dtype} {owners.shape}")
    if v.shape[0] % max(len(owners), 1):
        raise ValueError(
            f"owners: expected a divisor of {v.shape[0]} rows of samples, got {len(owners)}"
        )


def _check_backward(dy: Tensor, x: Any, xa: Any, call: MixedCall) -> None:
    check(dy, call, "dy")
    for name, t, columns, dtype in (
        ("x", x, call.weight.shape[1], dy.dtype),
        ("xa", xa, call.ranks, ranged(dy.dtype)),
    ):
        check_shape(name, t, dy, (len(dy), columns), "dy")
        if t is not None and t.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {t.dtype}")


def check_all_memory(call: MixedCall, **others: Tensor | None) -> None:
    """Check that all tensors of a call have the memory that they span.

    Raises:
        ValueError: one that was emptied or shrunk.
    """
    check_memory(weight=call.weight, bias=call.bias, **others)
    for a, b in zip(call.a, call.b, strict=True):
        check_memory(lora_A=a, lora_B=b)


def _fake_forward(impl: str, x: Tensor, bias: Any, *flat: Any) -> tuple[Tensor, Tensor]:
    call = mixed_call_of(bias, *flat)
    check(x, call)
    y = x.new_empty(x.shape[0], call.weight.shape[0])
    return y, x.new_empty(x.shape[0], call.ranks, dtype=ranged(x.dtype))


def _fake_backward(impl: str, dy: Tensor, x: Any, xa: Any, *flat: Any) -> tuple[Any, ...]:
    *given, wanted = flat
    call, need = mixed_call_of(None, *given), Wanted(*wanted)
    _check_backward(dy, x, xa, call)
    return (
        dy.new_empty((dy.shape[0], call.weight.shape[1]) if need.dx else 0),
        [a.new_empty(a.shape) for a in call.a] if need.da else [],
        [b.new_empty(b.shape) for b in call.b] if need.db else [],
        dy.new_empty(call.weight.shape[0] if need.dbias else 0),
    )


def _compute(impl: str, forward: Any, x: Tensor, bias: Any, *flat: Any) -> Any:
    call = mixed_call_of(bias, *flat)
    check(x, call)
    return forward(x, call)


def _compute_gradients(
    impl: str, backward: Any, dy: Tensor, x: Any, xa: Any, *flat: Any
) -> tuple[Any, ...]:
    *given, wanted = flat
    call = mixed_call_of(None, *given)
    _check_backward(dy, x, xa, call)
    return _as_results(dy, backward(dy, x, xa, call, Wanted(*wanted)))


def _as_results(dy: Tensor, found: MixedGradients) -> tuple[Any, ...]:
    """Return gradients as the schema has them: an empty one or none is not asked for."""
    dx, da, db, dbias = found
    dx, dbias = (dy.new_empty(0) if t is None else t.contiguous() for t in (dx, dbias))
    return dx, [t.contiguous() for t in da], [t.contiguous() for t in db], dbias


def _cast(impl: str, dtype: torch.dtype, v: Tensor, *others: Any) -> tuple[Any, ...]:
    """Return the arguments under autocast: what comes first in W's dtype."""
    weight = others[next(i for i, t in enumerate(others) if isinstance(t, (list, tuple))) - 1]
    return v.to(weight.dtype), *others


def _recorded_forward(both: Operators, x: Tensor, bias: Any, *flat: Any) -> Any:
    """Be the forward operator's autograd kernel: what a captured graph's backward needs."""
    call = mixed_call_of(bias, *flat)
    _check_frozen(call)
    return _differentiable(both, x, call)


def _recorded_backward(both: Operators, dy: Tensor, x: Any, xa: Any, *flat: Any) -> Any:
    """Be the backward operator's autograd kernel: torch's operators where it is recorded."""
    *given, wanted = flat
    if not is_recorded(dy, x, xa, *given[1], *given[2]):
        return below_autograd(both.backward, dy, x, xa, *flat)
    found = reference.backward(dy, x, xa, mixed_call_of(None, *given), Wanted(*wanted))
    return _as_results(dy, found)


register(
    OP,
    "mixed",
    Direction(
        "forward", _FORWARD, _fake_forward, _compute,
        lambda x, bias, *flat: check(x, mixed_call_of(bias, *flat)), _cast, _recorded_forward,
    ),
    Direction(
        "backward", _BACKWARD, _fake_backward, _compute_gradients,
        lambda dy, x, xa, *flat: _check_backward(dy, x, xa, mixed_call_of(None, *flat[:-1])),
        _cast, _recorded_backward,
    ),
)  # fmt: skip
_OPERATORS = {i.name: operators(OP, i.name) for i in IMPLEMENTATIONS}


def serves(impl: str, x: Tensor) -> bool:
    """Whether the operators serve a call of x at all; the grouped layer's serve others."""
    return x.is_cpu and has_op(impl, OP)


def run(x: Tensor, call: MixedCall, impl: str, layer: str = "") -> Tensor:
    """Compute a call whose tensors are known to fit each other."""
    _check_frozen(call)
    if needs_plain_torch():
        check_plain(impl)
        return reference.forward(x, call)[0]
    asked = (OP, x.device, x.dtype, call.ranks, call.dropout is not None, "dense")
    both = _OPERATORS[choose(impl, asked).name]
    if torch.compiler.is_exporting():
        y: Tensor = both.forward(x, call.bias, *call.flat())[0]
        return y
    return _differentiable(both, x, call, layer)[0]


def _check_frozen(call: MixedCall) -> None:
    if call.weight.requires_grad and torch.is_grad_enabled():
        raise TypeError("weight: expected a frozen weight, got one that requires grad")


class _Params(NamedTuple):
    """The other arguments of a call, one object so that backward returns one None for them."""

    operators: Operators
    threshold: int
    layer: str  # the layer's path, for errors in backward


def _differentiable(both: Operators, x: Tensor, call: MixedCall, layer: str = "") -> Any:
    if not is_recorded(x, call.bias, *call.a, *call.b):
        return below_autograd(both.forward, x, call.bias, *call.flat())
    weight, a, b, scalings, owners, seed, threshold = call.flat()
    params = _Params(both, threshold, layer)
    return MixedLoraLinear.apply(x, call.bias, weight, scalings, owners, seed, params, *a, *b)


class MixedLoraLinear(torch.autograd.Function):
    """y and xa with gradients of x, bias and each factor; xa has none, it is for backward.

    Saves x, xa and the parameters; of x and xa only what the wanted gradients need.
    """

    @staticmethod
    def forward(ctx, x, bias, weight, scalings, owners, seed, params, *factors):
        count = len(factors) // 2
        y, xa = below_autograd(
            params.operators.forward,
            *(x, bias, weight, list(factors[:count]), list(factors[count:])),
            *(scalings, owners, seed, params.threshold),
        )
        needed = ctx.needs_input_grad[7:]
        ctx.save_for_backward(
            x if any(needed[:count]) else None,
            xa if any(needed[count:]) else None,
            *(weight, scalings, owners, seed, *factors),
        )
        ctx.params = params
        ctx.mark_non_differentiable(xa)
        see_missing_gradients(ctx)
        return y, xa

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return none_of(ctx)
        x, xa, weight, scalings, owners, seed, *factors = saved_tensors(ctx, ctx.params.layer, OP)
        count, params = len(factors) // 2, ctx.params
        needed = ctx.needs_input_grad[7:]
        wanted = Wanted(
            ctx.needs_input_grad[0], any(needed[:count]), any(needed[count:]),
            ctx.needs_input_grad[1],
        )  # fmt: skip
        flat = (weight, factors[:count], factors[count:], scalings, owners, seed, params.threshold)
        if backward_needs_plain_torch(dy):
            found = _with_graph(dy, x, xa, mixed_call_of(None, *flat), wanted)
        else:
            found = below_autograd(params.operators.backward, dy, x, xa, *flat, list(wanted))
        dx, da, db, dbias = found
        grads = (*(da if wanted.da else (None,) * count), *(db if wanted.db else (None,) * count))
        return (
            *(dx if wanted.dx else None, dbias if wanted.dbias else None, *(None,) * 5),
            *(grad if need else None for grad, need in zip(grads, needed, strict=True)),
        )


def _with_graph(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: MixedCall, wanted: Wanted
) -> MixedGradients:
    """Return the gradients by torch's own operators, and xa with its graph: saved, it is constant.

    Raises:
        RuntimeError: a second derivative needs x, which wasn't saved.
    """
    if torch.is_grad_enabled() and xa is not None:
        if x is None:
            raise unsaved_x(OP)
        xa = reference.forward(x, call)[1]
    return reference.backward(dy, x, xa, call, wanted)

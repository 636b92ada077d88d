"""What fits together in a call of `grouped_lora_linear`, as far as shapes and dtypes say."""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.checks import (
    check_finite,
    check_shape,
    is_dtensor,
    not_a_float_tensor,
)
from lora_kernels.operands.grouped import GroupedCall, Groups
from lora_kernels.operands.precision import ranged

_ONE_DTYPE, _EITHER = (torch.int32,), (torch.int32, torch.int64)
# Of which integers each of `Groups` is.
_INTEGERS = dict(
    zip(Groups._fields, (_ONE_DTYPE, _EITHER, _EITHER, _ONE_DTYPE, _ONE_DTYPE), strict=True)
)


def check_tensors(v: Any, given: list[tuple[str, Any, int]], name: str) -> None:
    """Check that what is given, (name, tensor, dimensions), are plain tensors beside v.

    Raises:
        TypeError, ValueError: a tensor isn't one, or weight or bias has another dtype than v.
    """
    for what, t, dims in given:
        error = not_a_float_tensor(what, t, v, name)
        if error is not None:
            raise error
        if is_dtensor(t):
            raise TypeError(f"{what}: expected a plain tensor, got a DTensor")
        if t.ndim != dims:
            raise ValueError(f"{what}: expected {dims} dimensions, got shape {list(t.shape)}")
        if what in ("weight", "bias") and t.dtype != v.dtype:
            raise TypeError(f"{what}: expected the dtype of {name}, {v.dtype}, got {t.dtype}")


def check(v: Any, call: GroupedCall, name: str = "x") -> None:
    """Check the tensors of a call beside x [T, K] or, by its name, dy [S, N] against each other.

    Raises:
        TypeError, ValueError: an argument doesn't fit the others.
    """
    weight, (a, b, scaling), bias = call.weight, call.adapter, call.bias
    given: list[tuple[str, Any, int]] = [(name, v, 2), ("weight", weight, 3)]
    given += [("lora_A", a, 3), ("lora_B", b, 3)]
    check_tensors(v, given if bias is None else [*given, ("bias", bias, 2)], name)
    count, n, k = weight.shape
    if v.shape[1] != (k if name == "x" else n):
        expected = f"[G, N, {v.shape[1]}]" if name == "x" else f"[G, {v.shape[1]}, K]"
        raise ValueError(
            f"weight: expected shape {expected} beside {name} of shape {list(v.shape)}, got "
            f"{list(weight.shape)}"
        )
    if a.shape[1] < 1 or a.shape[2] != k or b.shape != (a.shape[0], n, a.shape[1]):
        raise ValueError(
            f"lora_A, lora_B: expected shapes [G, R, {k}] and [G, {n}, R] of one G and one R, at "
            f"least 1, got {list(a.shape)} and {list(b.shape)}"
        )
    if bias is not None and bias.shape != (count, n):
        raise ValueError(f"bias: expected shape {[count, n]}, got {list(bias.shape)}")
    if isinstance(scaling, Tensor) and scaling.shape not in ((), a.shape[:1]):
        raise ValueError(f"scaling: expected shape [] or [{a.shape[0]}], got {list(scaling.shape)}")
    _check_groups(v, call)


def check_backward(dy: Any, x: Tensor | None, xa: Tensor | None, call: GroupedCall) -> None:
    """Check what a backward operator was given; parameters may have changed since forward.

    Raises:
        TypeError, ValueError: an argument doesn't fit the others.
    """
    check(dy, call, "dy")
    k, r = call.weight.shape[2], call.adapter.a.shape[1]
    for name, t, shape, dtype in (
        ("dy", dy, (call.sorted_rows, dy.shape[1]), dy.dtype),
        ("x", x, (call.tokens, k), dy.dtype),
        ("xa", xa, (call.sorted_rows, r), ranged(dy.dtype)),
    ):
        check_shape(name, t, dy, shape, "dy")
        if t is not None and t.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {t.dtype}")


def check_scaling(scaling: Any) -> None:
    """Check that scaling is a finite number or a float tensor, 0-dim or [G], without gradient.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(scaling, Tensor):
        return check_finite(scaling, name="scaling")
    if scaling.ndim > 1 or not scaling.is_floating_point() or scaling.requires_grad:
        raise ValueError(
            "scaling: expected a float tensor [] or [G] that doesn't require grad, got shape "
            f"{list(scaling.shape)}, {scaling.dtype}, requires_grad={scaling.requires_grad}"
        )
    return None


def _check_groups(v: Tensor, call: GroupedCall) -> None:
    groups, (a, _, _) = call.groups, call.adapter
    for name, dtypes in _INTEGERS.items():
        t: Any = getattr(groups, name)
        if t is None and name != "offsets":
            continue
        if not isinstance(t, Tensor) or t.dtype not in dtypes:
            expected = " or ".join(str(dtype)[6:] for dtype in dtypes)
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: expected a tensor of {expected}, got {got}")
        if t.ndim != 1 or t.device != v.device or t.layout is not torch.strided:
            raise ValueError(
                f"{name}: expected one dimension on {v.device}, got shape {list(t.shape)} on "
                f"{t.device}"
            )
    count = groups.offsets.shape[0]
    if groups.scatter is not None and groups.scatter.shape[0] != call.sorted_rows:
        raise ValueError(
            f"scatter: expected a number of each of {call.sorted_rows} sorted rows, got "
            f"{groups.scatter.shape[0]}"
        )
    for name, numbers, stack, of in (
        ("adapters", groups.adapters, a, "lora_A"),
        ("weights", groups.weights, call.weight, "weight"),
    ):
        if numbers is not None and numbers.shape[0] != count:
            raise ValueError(
                f"{name}: expected a number of each of {count} groups, got {numbers.shape[0]}"
            )
        if numbers is None and stack.shape[0] != count:
            raise ValueError(
                f"{name}: expected a number of each of {count} groups beside a {of} of shape "
                f"{list(stack.shape)}, got None"
            )

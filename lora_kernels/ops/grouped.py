"""`grouped_lora_linear`: its operators and the public function."""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.checks import check_dropout_p, check_memory, check_seed
from lora_kernels.dispatch import IMPLEMENTATIONS, check_plain, choose, preferred_of_groups
from lora_kernels.impl.eager import grouped_mm
from lora_kernels.impl.reference import grouped as reference
from lora_kernels.operands.call import Adapter, Wanted, autocast_dtype, scaling_for
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.grouped import GroupedCall, Groups, grouped_call_of
from lora_kernels.operands.precision import ranged
from lora_kernels.ops.grouped_checks import check, check_backward, check_scaling
from lora_kernels.ops.grouped_gradients import GroupedLoraLinear, Params
from lora_kernels.registration import (
    Direction,
    Operators,
    as_results,
    below_autograd,
    is_recorded,
    operators,
    register,
)
from lora_kernels.transforms import needs_plain_torch

_CALL = (
    "Tensor weight, Tensor lora_A, Tensor lora_B, Tensor offsets, Tensor? rows, Tensor? scatter, "
    "Tensor? adapters, Tensor? weights, Tensor? seed, int threshold, Tensor? scaling_tensor, "
    "float scaling"
)
_FORWARD = f"(Tensor x, Tensor? bias, {_CALL}) -> (Tensor y, Tensor xa)"
_BACKWARD = (
    f"(Tensor dy, Tensor? x, Tensor? xa, SymInt tokens, {_CALL}, bool[4] wanted) -> "
    "(Tensor dx, Tensor da, Tensor db, Tensor dbias)"
)


def _check_forward(x: Tensor, bias: Any, *flat: Any) -> None:
    check(x, grouped_call_of(bias, x.shape[0], *flat))


def _check_backward(dy: Tensor, x: Any, xa: Any, tokens: int, *flat: Any) -> None:
    check_backward(dy, x, xa, grouped_call_of(None, tokens, *flat[:-1]))


def _fake_forward(impl: str, x: Tensor, bias: Any, *flat: Any) -> tuple[Tensor, Tensor]:
    call = grouped_call_of(bias, x.shape[0], *flat)
    check(x, call)
    shapes = (call.sorted_rows, call.weight.shape[1]), (call.sorted_rows, call.adapter.a.shape[1])
    return x.new_empty(shapes[0]), x.new_empty(shapes[1], dtype=ranged(x.dtype))


def _fake_backward(
    impl: str, dy: Tensor, x: Any, xa: Any, tokens: int, *flat: Any
) -> tuple[Tensor, ...]:
    *given, wanted = flat
    call = grouped_call_of(None, tokens, *given)
    check_backward(dy, x, xa, call)
    results = (
        dy.new_empty(tokens, call.weight.shape[2]),
        torch.empty_like(call.adapter.a, memory_format=torch.contiguous_format),
        torch.empty_like(call.adapter.b, memory_format=torch.contiguous_format),
        dy.new_empty(call.weight.shape[:2]),
    )
    return tuple(t if want else dy.new_empty(0) for want, t in zip(wanted, results, strict=True))


def _compute(impl: str, forward: Any, x: Tensor, bias: Any, *flat: Any) -> Any:
    call = grouped_call_of(bias, x.shape[0], *flat)
    check(x, call)
    return forward(x, call)


def _compute_gradients(
    impl: str, backward: Any, dy: Tensor, x: Any, xa: Any, tokens: int, *flat: Any
) -> tuple[Tensor, ...]:
    *given, wanted = flat
    call = grouped_call_of(None, tokens, *given)
    check_backward(dy, x, xa, call)
    return as_results(dy, backward(dy, x, xa, call, Wanted(*wanted)))


def _cast(impl: str, dtype: torch.dtype, v: Tensor, *others: Any) -> tuple[Any, ...]:
    """Return the arguments under autocast: what comes first in W's dtype; W is never copied."""
    weight = next(t for t in others if isinstance(t, Tensor) and t.ndim == 3)
    return v.to(weight.dtype), *others


def _recorded_forward(both: Operators, x: Tensor, bias: Any, *flat: Any) -> Any:
    """Be the forward operator's autograd kernel: what a captured graph's backward needs."""
    call = grouped_call_of(bias, x.shape[0], *flat)
    _check_frozen(call)
    return _differentiable(both, x, call)


def _recorded_backward(
    both: Operators, dy: Tensor, x: Any, xa: Any, tokens: int, *flat: Any
) -> Any:
    """Be the backward operator's autograd kernel: torch's operators where it is recorded."""
    if not is_recorded(dy, x, xa, *flat[1:3]):
        return below_autograd(both.backward, dy, x, xa, tokens, *flat)
    *given, wanted = flat
    call = grouped_call_of(None, tokens, *given)
    return as_results(dy, reference.backward(dy, x, xa, call, Wanted(*wanted)))


register(
    "grouped_lora_linear",
    "grouped",
    Direction(
        "forward", _FORWARD, _fake_forward, _compute, _check_forward, _cast, _recorded_forward
    ),
    Direction(
        "backward", _BACKWARD, _fake_backward, _compute_gradients, _check_backward, _cast,
        _recorded_backward,
    ),
)  # fmt: skip
_OPERATORS = {i.name: operators("grouped_lora_linear", i.name) for i in IMPLEMENTATIONS}


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    scatter: Tensor | None = None,
    adapters: Tensor | None = None,
    weights: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Apply a linear layer with a LoRA adapter to each group of rows, as experts or adapters have::

        y[to i] = x[from i] W[w]ᵀ + bias[w] + scaling[a] · D(x[from i]) A[a]ᵀ B[a]ᵀ

    Sorted rows i = 0 ... S - 1 belong to groups one after the other; w and a are the group's weight
    and adapter. from i is rows[i] and to i is scatter[i], or i itself. No product as large as the
    weights is formed.

    Args:
        x: [T, K], float16, bfloat16, float32 or float64; any strides.
        weight: [G, N, K], x's dtype, frozen; any strides: W stored as [G, K, N] is passed as
            `stored.transpose(1, 2)`.
        lora_A: [G, R, K], R >= 1, any of the float dtypes; any strides.
        lora_B: [G, N, R], likewise; PEFT's parameter w [N, R · G] is
            `w.view(N, R, G).permute(2, 0, 1)`.
        offsets: int32 [G], the end of each group among the sorted rows, in ascending order; a group
            may be empty, rows after the last one are zeros in y.
        bias: [G, N], x's dtype, or None.
        rows: int32 or int64 [S], the row of x that each sorted row reads; None: S = T, x is sorted.
        scatter: int32 or int64 [S], the row of y that each sorted row writes, each at most once;
            rows of y that none writes are zeros. None: y is sorted.
        adapters: int32 [G], the number of each group's adapter among lora_A's and lora_B's, -1 for
            none; None: the group's own number.
        weights: int32 [G], likewise of each group's weight and bias.
        scaling: a float, a 0-dim tensor, or one number of each adapter [G]; no gradient.
        dropout_p: probability in [0, 1), applied in steps of 1/65536.
        training: whether dropout is applied.
        seed: key of the dropout mask, as for `lora_linear`. The mask's row is that of y, so it
            doesn't depend on how rows are sorted, where `scatter` says to which they belong.
        impl: "auto", "triton", "cpu", "eager" or "reference". A named implementation serves the
            call or raises. "auto" is torch's grouped_mm by "eager" where that is one kernel: in
            bfloat16 on sm_90 and sm_100, for groups with a weight and an adapter of their own; and
            "eager" on GPUs with dropout or a rank that isn't 16, 32, 64, 128 or 256, which "triton"
            hasn't computed on one.

    Returns:
        y, [S, N], in x's dtype.

    Precision: as `lora_linear`; of float16 the adapter branch is float32. With `rows` x's gradient
    is summed over a row's groups in float32, in an order that depends on `offsets` and `rows`
    alone. Under autocast x is cast to weight's dtype, as transformers' experts do: a copy of all
    weights at each call would cost more than the product.

    Inside torch.func's transforms, forward-mode differentiation and jit.trace the call is made of
    torch's own operators, by the formulas of "reference".

    Raises:
        TypeError: an argument is not a dense tensor or number, dtypes that can't be combined, or a
            weight that requires grad.
        ValueError: shapes, devices, ranges, or an `impl` that can't serve the call; on CPUs, and
            where the host reads them, also offsets that don't ascend or rows that aren't there.

    Source: Hu et al., LoRA, arXiv:2106.09685; groups as in torch.nn.functional.grouped_mm.

    Example:
        >>> x, weight = torch.ones(3, 2), torch.stack([torch.eye(2), 10 * torch.eye(2)])
        >>> a, b = torch.ones(2, 1, 2), torch.ones(2, 2, 1)
        >>> ends = torch.tensor([1, 3], dtype=torch.int32)
        >>> lk.grouped_lora_linear(x, weight, a, b, ends, scaling=0.5)  # 1 + 0.5 · 2, 10 + 0.5 · 2
        tensor([[ 2.,  2.],
                [11., 11.],
                [11., 11.]])
    """
    if autocast_dtype(x) is not None and isinstance(weight, Tensor):
        check_memory(x=x)
        x = x.to(weight.dtype)
    check_scaling(scaling)
    groups = Groups(offsets, rows, scatter, adapters, weights)
    tokens = x.shape[0] if isinstance(x, Tensor) and x.ndim else 0
    call = GroupedCall(weight, Adapter(lora_A, lora_B, scaling), bias, groups, None, tokens)
    check(x, call)
    scaling = scaling_for(scaling, x.device)
    check_dropout_p(dropout_p)
    check_seed(seed, x.device)
    dropout = drawn(dropout_p, seed, x.device) if training and dropout_p else None
    call = call._replace(adapter=Adapter(lora_A, lora_B, scaling), dropout=dropout)
    return run(x, call, impl)


def run(x: Tensor, call: GroupedCall, impl: str, layer: str = "") -> Tensor:
    """Compute a call whose tensors are known to fit each other; modules come in here."""
    _check_frozen(call)
    if needs_plain_torch():
        check_plain(impl)
        return reference.forward(x, call)[0]
    rank, dropout = call.adapter.a.shape[1], call.dropout is not None
    asked = ("grouped_lora_linear", x.device, x.dtype, rank, dropout, "dense")
    impl = preferred_of_groups(x, rank, dropout) if impl == "auto" else impl
    if impl == "auto" and grouped_mm.serves(x, call):
        impl = "eager"
    both = _OPERATORS[choose(impl, asked).name]
    if torch.compiler.is_exporting():
        return both.forward(x, call.bias, *call.flat())[0]
    return _differentiable(both, x, call, layer)[0]


def _differentiable(both: Operators, x: Tensor, call: GroupedCall, layer: str = "") -> Any:
    flat = call.flat()
    if not is_recorded(x, call.bias, call.adapter.a, call.adapter.b):
        return below_autograd(both.forward, x, call.bias, *flat)
    *tensors, threshold, scaling_tensor, scaling = flat
    params = Params(both, threshold, scaling, layer)
    return GroupedLoraLinear.apply(x, call.bias, *tensors, scaling_tensor, params)


def _check_frozen(call: GroupedCall) -> None:
    if call.weight.requires_grad and torch.is_grad_enabled():
        raise TypeError("weight: expected frozen weights, got some that require grad")

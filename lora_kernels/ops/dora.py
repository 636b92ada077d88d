"""`lora_dora_linear`: its operators, what may be passed, and which implementation computes it."""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.checks import (
    check_backward,
    check_call,
    check_dropout_p,
    check_magnitude,
    check_memory,
    check_norm,
    check_scaling,
    check_seed,
)
from lora_kernels.dispatch import IMPLEMENTATIONS, check_plain, choose
from lora_kernels.impl.eager.dora import scaled
from lora_kernels.impl.reference import dora as reference
from lora_kernels.operands.call import (
    Adapter,
    LinearCall,
    as_autocast,
    autocast_dtype,
    call_of,
    scaling_for,
)
from lora_kernels.operands.dora import DoraCall, DoraWanted, Kept
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.onednn import OnednnWeight
from lora_kernels.operands.precision import has_wide_branch
from lora_kernels.operands.weight import Dense
from lora_kernels.ops.dora_gradients import DoraOperatorFunction, LoraDoraLinear
from lora_kernels.ops.linear import run as run_linear
from lora_kernels.ops.linear_gradients import CallParams
from lora_kernels.registration import (
    Direction,
    Operators,
    as_results,
    below_autograd,
    is_recorded,
    library,
    operators,
    register,
)
from lora_kernels.transforms import compiles_ahead, needs_plain_torch

_OP = "lora_dora_linear"
_CALL = (
    "Tensor x, Tensor magnitude, Tensor weight, Tensor[]? parts, str? format, Tensor lora_A, "
    "Tensor lora_B, Tensor? bias, Tensor? seed, int threshold, Tensor? scaling_tensor, "
    "float scaling"
)
_FORWARD = f"({_CALL}) -> (Tensor y, Tensor xa, Tensor u, Tensor norm)"
_BACKWARD = (
    "(Tensor dy, Tensor? x, Tensor? xa, Tensor? u, Tensor norm, Tensor magnitude, Tensor weight, "
    "Tensor[]? parts, str? format, Tensor lora_A, Tensor lora_B, Tensor? seed, int threshold, "
    "Tensor? scaling_tensor, float scaling, bool[5] wanted) -> "
    "(Tensor dx, Tensor da, Tensor db, Tensor dbias, Tensor dm)"
)


def _call(magnitude: Tensor, *flat: Any) -> DoraCall:
    return DoraCall(call_of(*flat), magnitude)


def _backward_call(
    x: Any, xa: Any, u: Any, norm: Tensor, magnitude: Tensor, *flat: Any
) -> tuple[Kept, DoraCall]:
    linear = call_of(*flat[:5], None, *flat[5:])
    return Kept(x, xa, u, norm), DoraCall(linear, magnitude)


def _check_forward(x: Tensor, *flat: Any) -> None:
    linear, magnitude = _call(*flat)
    check_call(x, linear, cast=None)
    check_magnitude(magnitude, x, linear.weight.shape[0])


def _check_backward(dy: Tensor, *flat: Any) -> None:
    kept, (linear, magnitude) = _backward_call(*flat[:-1])
    # xa and u are float32 where forward made them so, in whichever implementation.
    may_be = has_wide_branch(dy, linear.adapter)
    wide = may_be and kept.xa is not None and kept.xa.dtype == torch.float32
    check_backward(dy, kept.x, kept.xa, linear, wide_xa=wide)
    check_magnitude(magnitude, dy, linear.weight.shape[0])
    check_norm(kept.norm, kept.u, dy, may_be)


def _fake_forward(impl: str, x: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    _check_forward(x, *flat)
    linear = _call(*flat).linear
    n, r = linear.weight.shape[0], linear.adapter.a.shape[0]
    y = x.new_empty(*x.shape[:-1], n)
    m = y.numel() // n
    branch = torch.float32 if has_wide_branch(x, linear.adapter) else x.dtype
    norm = torch.promote_types(x.dtype, torch.float32)
    products = (x.new_empty(shape, dtype=branch) for shape in ((m, r), (m, n)))
    return y, *products, x.new_empty(n, dtype=norm)


def _fake_backward(impl: str, dy: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    _check_backward(dy, *flat)
    *given, wanted = flat
    _, (linear, magnitude) = _backward_call(*given)
    results = (
        dy.new_empty(*dy.shape[:-1], linear.weight.shape[1]),
        torch.empty_like(linear.adapter.a, memory_format=torch.contiguous_format),
        torch.empty_like(linear.adapter.b, memory_format=torch.contiguous_format),
        dy.new_empty(dy.shape[-1]),
        torch.empty_like(magnitude, memory_format=torch.contiguous_format),
    )
    return tuple(t if want else dy.new_empty(0) for want, t in zip(wanted, results, strict=True))


def _compute(impl: str, forward: Any, x: Tensor, *flat: Any) -> Any:
    _check_forward(x, *flat)
    call = _call(*flat)
    return forward(x, call)


def _compute_gradients(impl: str, backward: Any, dy: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    _check_backward(dy, *flat)
    *given, wanted = flat
    kept, call = _backward_call(*given)
    return as_results(dy, backward(dy, kept, call, DoraWanted(*wanted)))


def _cast_forward(impl: str, dtype: torch.dtype, x: Tensor, *flat: Any) -> tuple[Any, ...]:
    return as_autocast(x, dtype), *_call(*flat).cast(dtype).flat()


def _cast_backward(impl: str, dtype: torch.dtype, dy: Tensor, *flat: Any) -> tuple[Any, ...]:
    *given, wanted = flat
    (x, xa, u, norm), call = _backward_call(*given)
    linear, cast = call.linear.cast(dtype), as_autocast(dy, dtype)
    wide = cast is not None and has_wide_branch(cast, linear.adapter)
    branch = torch.float32 if wide else dtype
    products = as_autocast(x, dtype), as_autocast(xa, branch), as_autocast(u, branch), norm
    return cast, *products, call.magnitude, *linear.flat_backward(), wanted


def _recorded_forward(both: Operators, x: Tensor, *flat: Any) -> Any:
    """Be the forward operator's autograd kernel: what a captured graph's backward needs."""
    magnitude, weight, parts, form, a, b, bias, seed, threshold, scaling_tensor, scaling = flat
    if not is_recorded(x, weight, a, b, bias, magnitude):
        return below_autograd(both.forward, x, *flat)
    params = CallParams(both, form, parts, parts, threshold, scaling)
    return DoraOperatorFunction.apply(
        x, weight, a, b, bias, magnitude, seed, scaling_tensor, params
    )


def _recorded_backward(both: Operators, dy: Tensor, *flat: Any) -> Any:
    """Be the backward operator's autograd kernel: torch's operators where it is recorded."""
    *given, wanted = flat
    kept, call = _backward_call(*given)
    weight, (a, b, _), _, _ = call.linear
    if not is_recorded(dy, *kept, weight.decode(), a, b, call.magnitude):
        return below_autograd(both.backward, dy, *flat)
    return as_results(dy, reference.backward(dy, kept, call, DoraWanted(*wanted)))


register(
    _OP,
    "dora",
    Direction(
        "forward", _FORWARD, _fake_forward, _compute, _check_forward, _cast_forward,
        _recorded_forward,
    ),
    Direction(
        "backward", _BACKWARD, _fake_backward, _compute_gradients, _check_backward, _cast_backward,
        _recorded_backward,
    ),
)  # fmt: skip
_OPERATORS = {i.name: operators(_OP, i.name) for i in IMPLEMENTATIONS}
# As torch.export records the layer; see `linear`.
library.define(f"{_OP}({_CALL}, str impl) -> Tensor")


def lora_dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Apply a linear layer with a DoRA adapter: rows of W + scaling · B A, rescaled::


        g = magnitude / ‖W + scaling · B A‖            of each row; the norm gets no gradient
        u = D(x) Wᵀ + scaling · D(x) Aᵀ Bᵀ
        y = x Wᵀ + bias + scaling · D(x) Aᵀ Bᵀ + (g - 1) ⊙ u

    Without dropout that is y = g ⊙ u + bias. D drops elements as `lora_linear`'s does; in training
    D(x) is multiplied by the frozen weight, too, a second product of x's size. g is 1 where the
    magnitude is the norm within their roundings, as both are at the start of training; on a CPU,
    where all are and lora_B is zero, y is the base layer's bit for bit.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64; any strides, M = 0 allowed.
        weight: [N, K], x's dtype, dense. Frozen by convention; if it requires grad, its gradient
            takes the norm as a constant.
        lora_A: [R, K], R >= 1, any of the float dtypes.
        lora_B: [N, R], likewise.
        magnitude: [N], likewise, of any sign; m of the paper.
        bias: [N], x's dtype, or None. It is not rescaled.
        scaling, dropout_p, training, seed: as `lora_linear`.
        impl: "auto", "triton", "cpu", "eager" or "reference"; a named one serves or raises.

    Returns:
        y, [..., N], in x's dtype. A row whose norm is zero has an infinite gain, and y and
        gradients there aren't finite, as in PEFT.

    Precision: as `lora_linear`. The norm is formed in float32 (float64 for float64) of weight,
    lora_A and lora_B as they are stored, its relative error below 1e-5; y is formed of u, g and
    bias in that dtype and rounded once. u and, in backward, g ⊙ dy are rounded to x's dtype, by
    "cpu" g ⊙ lora_B instead where that does, but not beside wider adapters on a float16 x on a CPU:
    what is rescaled to its range may leave it.
    lora_A's, lora_B's and magnitude's gradients come back in their own dtypes. Autocast,
    torch.func's transforms, forward-mode and second derivatives are served as by `lora_linear`;
    the norm is a constant to all of them.

    Raises:
        TypeError: an argument is not a dense tensor or number, or dtypes that can't be combined.
        ValueError: shapes, devices, ranges, or an `impl` that can't serve the call.

    Source: Liu et al., DoRA, arXiv:2402.09353, equation 5 and section 4.3.

    Example:
        >>> x, weight = torch.ones(1, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> lora_A, lora_B = torch.ones(1, 2), torch.zeros(2, 1)
        >>> lk.lora_dora_linear(x, weight, lora_A, lora_B, torch.tensor([10.0, 1.0]))
        tensor([[14.,  1.]])
    """
    linear = LinearCall(Dense(weight), Adapter(lora_A, lora_B, scaling), bias, None)
    cast = autocast_dtype(x)
    check_call(x, linear, cast=cast)
    check_magnitude(magnitude, x, weight.shape[0])
    check_scaling(scaling)
    linear = linear._replace(adapter=Adapter(lora_A, lora_B, scaling_for(scaling, x.device)))
    check_dropout_p(dropout_p)
    check_seed(seed, x.device)
    if training and dropout_p:
        linear = linear._replace(dropout=drawn(dropout_p, seed, x.device))
    call = DoraCall(linear, magnitude)
    if needs_plain_torch():
        return _by_plain_torch(x, call, impl, cast)
    return run(x, call, impl, cast)


def run(
    x: Tensor, call: DoraCall, impl: str, cast: torch.dtype | None = None, layer: str = ""
) -> Tensor:
    """Compute a call whose tensors are known to fit each other; modules come in here.

    cast: `autocast_dtype(x)`. layer: the layer's path, which an error in backward names.
    """
    if cast is not None:
        check_memory(x=x, weight=call.linear.weight.decode(), bias=call.linear.bias)
        x, call = x.to(cast), call.cast(cast)
    if isinstance(call.linear.weight, OnednnWeight):  # packed before this adapter was active
        call.linear.weight.unused = "DoRA", x.dtype
        call = call._replace(linear=call.linear._replace(weight=Dense(call.linear.weight.stored)))
    if torch.compiler.is_exporting():
        return torch.ops.lora_kernels.lora_dora_linear.default(x, *call.flat(), impl)
    both = _operators(x, call, impl)
    magnitude, weight, parts, form, a, b, bias, *others = call.flat()
    if not is_recorded(x, weight, a, b, bias, magnitude):
        return below_autograd(both.forward, x, *call.flat())[0]
    seed, threshold, scaling_tensor, scaling = others
    params = CallParams(both, form, parts, parts, threshold, scaling, layer)
    tensors = weight, a, b, bias, magnitude, seed, scaling_tensor
    return LoraDoraLinear.apply(x, *tensors, params)


def run_with_norm(
    x: Tensor, call: DoraCall, norm: Tensor, impl: str, cast: torch.dtype | None = None
) -> Tensor:
    """Compute a call without dropout and gradients whose norms are known: y = g ⊙ z + bias.

    z is the linear layer's product, by whichever implementation serves that.
    """
    gain = call.gain(norm)
    if call.starts(gain):
        x, call = (x, call) if cast is None else (x.to(cast), call.cast(cast))
        weight, _, bias, _ = call.linear
        check_memory(x=x, weight=weight.decode(), bias=bias)
        return call.base_output(x)
    linear = call.linear
    z = run_linear(x, linear._replace(bias=None), impl, cast)
    bias = linear.bias if cast is None else as_autocast(linear.bias, cast)
    rows = z.reshape(-1, z.shape[-1])
    return scaled(rows, gain, bias).view(z.shape)


def _operators(x: Tensor, call: DoraCall, impl: str) -> Operators:
    weight, adapter, _, dropout = call.linear
    rank = adapter.a.shape[0]
    chosen = choose(impl, (_OP, x.device, x.dtype, rank, dropout is not None, weight.format))
    return _OPERATORS[chosen.name]


def _exported(x: Tensor, *flat: Any) -> Tensor:
    """Be the body of the operator that torch.export records, run or decomposed."""
    *given, impl = flat
    call = _call(*given)
    if not torch.compiler.is_exporting():
        if needs_plain_torch():
            return _by_plain_torch(x, call, impl, autocast_dtype(x))
        return run(x, call, impl)
    if compiles_ahead():
        return _operators(x, call, impl).forward(x, *given)[0]
    return reference.forward(x, call)[0]


library.impl(_OP, _exported, "CompositeImplicitAutograd")


def _by_plain_torch(x: Tensor, call: DoraCall, impl: str, cast: torch.dtype | None) -> Tensor:
    """Compute the reference's formulas, which torch differentiates, maps and traces by itself."""
    check_plain(impl)
    if cast is not None:
        x, call = x.to(cast), call.cast(cast)
    return reference.forward(x, call)[0]

"""`lora_linear`: its operators, what may be passed, and which implementation computes it."""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.checks import (
    check_backward,
    check_call,
    check_dropout_p,
    check_memory,
    check_scaling,
    check_seed,
    is_dtensor,
    plainly_fit,
)
from lora_kernels.dispatch import IMPLEMENTATIONS, Implementation, check_plain, choose, preferred
from lora_kernels.impl.reference import linear as reference
from lora_kernels.operands.call import (
    Adapter,
    LinearCall,
    Wanted,
    as_autocast,
    autocast_dtype,
    call_of,
    scaling_for,
)
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.onednn import OnednnWeight
from lora_kernels.operands.precision import has_wide_branch
from lora_kernels.operands.weight import Dense, QuantizedWeight
from lora_kernels.ops.linear_gradients import CallParams, LoraLinear, OperatorFunction
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

_CALL = (
    "Tensor x, Tensor weight, Tensor[]? parts, str? format, Tensor lora_A, Tensor lora_B, "
    "Tensor? bias, Tensor? seed, int threshold, Tensor? scaling_tensor, float scaling"
)
_FORWARD = f"({_CALL}) -> (Tensor y, Tensor xa)"
_BACKWARD = (
    "(Tensor dy, Tensor? x, Tensor? xa, Tensor weight, Tensor[]? parts, str? format, "
    "Tensor lora_A, Tensor lora_B, Tensor? seed, int threshold, Tensor? scaling_tensor, "
    "float scaling, bool[4] wanted) -> (Tensor dx, Tensor da, Tensor db, Tensor dbias)"
)


def _keeps_xa_wide(impl: str, x: Tensor, call: LinearCall) -> bool:
    return impl in ("reference", "eager") and has_wide_branch(x, call.adapter)


def _backward_call(*flat: Any) -> LinearCall:
    """Return the call that a backward operator was given, by its arguments after xa."""
    return call_of(*flat[:5], None, *flat[5:])


def _fake_forward(impl: str, x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    call = call_of(*flat)
    check_call(x, call, cast=None)
    n, r = call.weight.shape[0], call.adapter.a.shape[0]
    y = x.new_empty(*x.shape[:-1], n)
    dtype = torch.float32 if _keeps_xa_wide(impl, x, call) else x.dtype
    return y, x.new_empty((y.numel() // n, r), dtype=dtype)


def _fake_backward(impl: str, dy: Tensor, x: Any, xa: Any, *flat: Any) -> tuple[Tensor, ...]:
    *given, wanted = flat
    call = _backward_call(*given)
    check_backward(dy, x, xa, call, wide_xa=_keeps_xa_wide(impl, dy, call))
    results = (
        dy.new_empty(*dy.shape[:-1], call.weight.shape[1]),
        torch.empty_like(call.adapter.a, memory_format=torch.contiguous_format),
        torch.empty_like(call.adapter.b, memory_format=torch.contiguous_format),
        dy.new_empty(dy.shape[-1]),
    )
    return tuple(t if want else dy.new_empty(0) for want, t in zip(wanted, results, strict=True))


def _compute(impl: str, forward: Any, x: Tensor, *flat: Any) -> Any:
    call = call_of(*flat)
    check_call(x, call, cast=None)
    return forward(x, call)


def _compute_gradients(
    impl: str, backward: Any, dy: Tensor, x: Any, xa: Any, *flat: Any
) -> tuple[Tensor, ...]:
    *given, wanted = flat
    call = _backward_call(*given)
    check_backward(dy, x, xa, call, wide_xa=_keeps_xa_wide(impl, dy, call))
    gradients = backward(dy, x, xa, call, Wanted(*wanted))
    return as_results(dy, gradients)


def _check_forward(x: Tensor, *flat: Any) -> None:
    check_call(x, call_of(*flat), cast=None)


def _check_backward(dy: Tensor, x: Any, xa: Any, *flat: Any) -> None:
    check_backward(dy, x, xa, _backward_call(*flat[:-1]))


def _cast_forward(impl: str, dtype: torch.dtype, x: Tensor, *flat: Any) -> tuple[Any, ...]:
    return as_autocast(x, dtype), *call_of(*flat).cast(dtype).flat()


def _cast_backward(
    impl: str, dtype: torch.dtype, dy: Tensor, x: Any, xa: Any, *flat: Any
) -> tuple[Any, ...]:
    *given, wanted = flat
    call, cast = _backward_call(*given).cast(dtype), as_autocast(dy, dtype)
    wide = cast is not None and _keeps_xa_wide(impl, cast, call)
    xa = as_autocast(xa, torch.float32 if wide else dtype)
    return cast, as_autocast(x, dtype), xa, *call.flat_backward(), wanted


def _recorded_forward(both: Operators, x: Tensor, *flat: Any) -> Any:
    """Be the forward operator's autograd kernel: what a captured graph's backward needs."""
    weight, parts, form, a, b, bias, seed, threshold, scaling_tensor, scaling = flat
    if not is_recorded(x, weight, a, b, bias):
        return below_autograd(both.forward, x, *flat)
    if isinstance(call_of(*flat).weight, QuantizedWeight):
        params, saved = CallParams(both, form, None, None, threshold, scaling), parts
    else:
        params, saved = CallParams(both, None, parts, None, threshold, scaling), ()
    return OperatorFunction.apply(x, weight, a, b, bias, seed, scaling_tensor, params, *saved)


def _recorded_backward(both: Operators, dy: Tensor, x: Any, xa: Any, *flat: Any) -> Any:
    """Be the backward operator's autograd kernel: torch's operators where it is recorded."""
    weight, _, _, a, b = flat[:5]
    if not is_recorded(dy, x, xa, weight, a, b):
        return below_autograd(both.backward, dy, x, xa, *flat)
    *flat_call, wanted = flat
    gradients = reference.backward(dy, x, xa, _backward_call(*flat_call), Wanted(*wanted))
    return as_results(dy, gradients)


register(
    "lora_linear",
    "linear",
    Direction(
        "forward", _FORWARD, _fake_forward, _compute, _check_forward, _cast_forward,
        _recorded_forward,
    ),
    Direction(
        "backward", _BACKWARD, _fake_backward, _compute_gradients, _check_backward, _cast_backward,
        _recorded_backward,
    ),
)  # fmt: skip
_OPERATORS = {i.name: operators("lora_linear", i.name) for i in IMPLEMENTATIONS}
# The layer as torch.export records it, whatever the implementation: it keeps its gradient, runs
# fused, and `run_decompositions` makes it torch's own operators.
library.define(f"lora_linear({_CALL}, str impl) -> Tensor")


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Apply a linear layer with a LoRA adapter; `dropout_p` does nothing without `training=True`::


        y = x Wᵀ + bias + scaling · D(x) Aᵀ Bᵀ

    D drops elements of the adapter branch's input with probability `dropout_p` and scales the
    kept ones so that the expectation is x; it is the identity unless `training`.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64; any strides, M = 0 allowed.
        weight: [N, K], x's dtype. Frozen by convention; if it requires grad, its gradient dyᵀ x is
            computed by one plain matmul. Or what `quantized_weight` returns, which is decoded to
            x's dtype.
        lora_A: [R, K], R >= 1, any of the float dtypes.
        lora_B: [N, R], likewise.
        bias: [N], x's dtype, or None.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA; a float or a 0-dim tensor
            that doesn't require grad.
        dropout_p: probability in [0, 1), applied in steps of 1/65536.
        training: whether dropout is applied.
        seed: key of the dropout mask, a signed 64-bit int or a 0-dim int64 tensor on x's device;
            None draws one from torch's generator of x's device, so `torch.manual_seed`
            reproduces a run and activation checkpointing redraws the same mask.
        impl: "auto", "triton", "cuda", "cpu", "eager" or "reference". A named implementation
            serves the call or raises.

    Returns:
        y, [..., N], in x's dtype.

    Precision: matrix products accumulate as torch's matmul does on x's device, in float32 for
    16-bit inputs. lora_A, lora_B, D(x) Aᵀ, x Wᵀ and y are rounded to x's dtype. "eager" rounds
    D(x) Aᵀ again after dropout's factor and, for M > 32, after scaling, and keeps the branch in
    float32 where adapters on a CPU are wider than a float16 x; "cpu" rounds
    scaling · D(x) Aᵀ once, from float32. "triton" and "cuda" form products of float32 inputs in
    float32, or by TF32 where torch.backends.cuda.matmul.fp32_precision is "tf32".
    Gradients: lora_A's and lora_B's come back in their own dtypes. Under autocast x, weight and
    bias are cast to autocast's dtype and y has that dtype; a float64 x is left as it is, a
    float64 weight or bias beside another x is refused, as torch's linear does.

    Inside torch.func's transforms (grad, vjp, jvp, vmap, jacrev, jacfwd, hessian), forward-mode
    differentiation and jit.trace the call is made of torch's own operators, by the formulas of
    "reference". A second derivative (create_graph) is, too.

    Raises:
        TypeError: an argument is not a dense tensor or number, or dtypes that can't be combined.
        ValueError: shapes, devices, ranges, or an `impl` that can't serve the call.

    Source: Hu et al., LoRA, arXiv:2106.09685, equation 3; rsLoRA: arXiv:2312.03732.

    Example:
        >>> x, weight = torch.ones(1, 3), torch.eye(2, 3)
        >>> lora_A, lora_B = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [0.5]])
        >>> lk.lora_linear(x, weight, lora_A, lora_B, scaling=2.0)  # 1 + 2 · 6, 1 + 2 · 3
        tensor([[13.,  7.]])
    """
    given = weight if isinstance(weight, QuantizedWeight) else Dense(weight)
    call = LinearCall(given, Adapter(lora_A, lora_B, scaling), bias, None)
    cast = autocast_dtype(x)
    if not plainly_fit(x, call, cast):
        check_call(x, call, cast=cast)
    if type(scaling) is not float or scaling - scaling != 0.0:
        check_scaling(scaling)
        scaling = scaling_for(scaling, x.device)
        call = call._replace(adapter=Adapter(lora_A, lora_B, scaling))
    if type(dropout_p) is not float or not 0.0 <= dropout_p < 1.0:
        check_dropout_p(dropout_p)
    if seed is not None:
        check_seed(seed, x.device)
    if training and dropout_p:
        call = call._replace(dropout=drawn(dropout_p, seed, x.device))
    if needs_plain_torch():
        return _by_plain_torch(x, call, impl, cast)
    return run(x, call, impl, cast)


def run(
    x: Tensor, call: LinearCall, impl: str, cast: torch.dtype | None = None, layer: str = ""
) -> Tensor:
    """Compute a call whose tensors are known to fit each other; modules come in here.

    cast: `autocast_dtype(x)`. layer: the layer's path, which an error in backward names.
    """
    given = call.weight
    if cast is not None:
        check_memory(x=x, weight=given.stored, bias=call.bias)
        x, call = x.to(cast), call.cast(cast)
        given = call.weight if isinstance(call.weight, OnednnWeight) else given
    if call.bias is not None and not call.bias.is_contiguous():
        check_memory(bias=call.bias)
        # oneDNN's linear reads a strided one as if it were not.
        call = call._replace(bias=call.bias.contiguous())
    if is_dtensor(x):
        from lora_kernels.sharding import sharded_call

        call = sharded_call(x, call)
    if torch.compiler.is_exporting():
        return torch.ops.lora_kernels.lora_linear.default(x, *call.flat(), impl)
    weight, (a, b, _), bias, dropout = call
    stored = weight.stored
    if impl == "auto" and not x.is_cpu and weight.format == "dense":
        impl = preferred(x, stored, dropout is not None)
    asked = ("lora_linear", x.device, x.dtype, a.shape[0], dropout is not None, weight.format)
    chosen = choose(impl, asked)
    if isinstance(given, OnednnWeight):
        call = _as_read(call, given, chosen, x.dtype)
    operators = _OPERATORS[chosen.name]
    if not torch.is_grad_enabled() or not _any_requires_grad(x, stored, a, b, bias):
        return below_autograd(operators.forward, x, *call.flat())[0]
    stored, parts, form, a, b, bias, seed, threshold, scaling_tensor, scaling = call.flat()
    if form is None:
        params = CallParams(operators, None, None, None, threshold, scaling, layer)
        return LoraLinear.apply(x, stored, a, b, bias, seed, scaling_tensor, params)
    if isinstance(weight, QuantizedWeight):
        params = CallParams(operators, form, None, None, threshold, scaling, layer)
        return LoraLinear.apply(x, stored, a, b, bias, seed, scaling_tensor, params, *parts)
    params = CallParams(operators, form, parts, weight.tensors(True)[1], threshold, scaling, layer)
    return LoraLinear.apply(x, stored, a, b, bias, seed, scaling_tensor, params)


def _as_read(
    call: LinearCall, given: OnednnWeight, chosen: Implementation, dtype: torch.dtype
) -> LinearCall:
    """Return the call with its packed copies where they are read, and note where they aren't."""
    if call.weight is given and given.format in chosen.ops["lora_linear"]:
        given.unused = None
        return call
    given.unused = chosen.name, dtype
    return call._replace(weight=Dense(call.weight.stored))


def _any_requires_grad(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
) -> bool:
    return (
        x.requires_grad
        or lora_A.requires_grad
        or lora_B.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    )


def _exported(x: Tensor, *flat: Any) -> Tensor:
    """Be the body of the operator that torch.export records, run or decomposed."""
    *given, impl = flat
    call = call_of(*given)
    if not torch.compiler.is_exporting():
        if needs_plain_torch():
            return _by_plain_torch(x, call, impl, autocast_dtype(x))
        return run(x, call, impl)
    if compiles_ahead():
        dropout, rank = call.dropout is not None, call.adapter.a.shape[0]
        chosen = choose(impl, ("lora_linear", x.device, x.dtype, rank, dropout, call.weight.format))
        return _OPERATORS[chosen.name].forward(x, *given)[0]
    return reference.forward(x, call)[0]


library.impl("lora_linear", _exported, "CompositeImplicitAutograd")


def _by_plain_torch(x: Tensor, call: LinearCall, impl: str, cast: torch.dtype | None) -> Tensor:
    """Compute the reference's formulas, which torch differentiates, maps and traces by itself."""
    check_plain(impl)
    if cast is not None:
        x, call = x.to(cast), call.cast(cast)
    return reference.forward(x, call)[0]

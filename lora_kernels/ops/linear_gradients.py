"""What the adapted linear layer saves for backward, and which gradients it returns."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from lora_kernels.impl.reference import linear as reference
from lora_kernels.impl.reference.mask import dropped
from lora_kernels.operands.call import LinearCall, Wanted, call_of
from lora_kernels.operands.dropout import Dropout
from lora_kernels.operands.weight import Parts
from lora_kernels.registration import Operators, below_autograd
from lora_kernels.transforms import backward_needs_plain_torch


class CallParams(NamedTuple):
    """The other arguments of a call, one object so that backward returns one None for them."""

    operators: Operators  # of the chosen implementation
    format: str | None
    parts: Parts  # packed copies of W, forward; those of codes are arguments of their own
    parts_backward: Parts
    threshold: int
    scaling: float
    layer: str = ""  # the layer's path, for errors in backward


class LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + scaling · D(x) Aᵀ Bᵀ with gradients of x, A, B and bias.

    x [..., K], weight [N, K] or codes, lora_A [R, K], lora_B [N, R], bias [N] or None, seed and
    scaling_tensor 0-dim or None, then what W is made of besides codes -> y [..., N].

    Saves x, xa, the parameters and the seed: never a mask, never D(x), never a decoded W; and of x
    and xa only what the wanted gradients need.
    """

    @staticmethod
    def forward(ctx, *inputs):
        return _forward(ctx, *inputs)[0]

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy)


class OperatorFunction(torch.autograd.Function):
    """The same for the operator itself, which returns xa besides: a captured graph calls it."""

    @staticmethod
    def forward(ctx, *inputs):
        y, xa = _forward(ctx, *inputs)
        ctx.shape, ctx.dtype = y.shape, y.dtype
        return y, xa

    @staticmethod
    def backward(ctx, dy, dxa):
        if dy is None and dxa is not None:
            dy = dxa.new_zeros(ctx.shape, dtype=ctx.dtype)
        grads = _gradients(ctx, dy)
        if dxa is None:
            return grads
        return *_with_gradient_of_xa(ctx, dxa, *grads[:3]), *grads[3:]


def _forward(ctx, x, weight, lora_A, lora_B, bias, seed, scaling_tensor, params, *parts):
    y, xa = below_autograd(
        params.operators.forward,
        *(x, weight, parts or params.parts, params.format, lora_A, lora_B, bias, seed),
        *(params.threshold, scaling_tensor, params.scaling),
    )
    _, need_weight, need_a, need_b = ctx.needs_input_grad[:4]
    ctx.save_for_backward(
        x if need_a or need_weight else None,
        xa if need_b else None,
        *(weight, lora_A, lora_B, seed, scaling_tensor, *parts),
    )
    ctx.params = params
    see_missing_gradients(ctx)
    return y, xa


def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of a Function's arguments, None where not needed."""
    if dy is None:
        return none_of(ctx)
    need_x, need_weight, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
    wanted = (need_x, need_a, need_b, need_bias)
    params: CallParams = ctx.params
    x, xa, weight, a, b, seed, scaling_tensor, *parts = saved_tensors(ctx, params.layer)
    if backward_needs_plain_torch(dy if parts or params.parts else None):
        call = call_of(
            *(weight, parts or None, params.format if parts else None, a, b, None, seed),
            *(params.threshold, scaling_tensor, params.scaling),
        )
        if torch.is_grad_enabled():
            xa = _xa_with_graph(x, xa, call, ctx.needs_input_grad[0])
        dx, da, db, dbias = reference.backward(dy, x, xa, call, Wanted(*wanted))
    else:
        dx, da, db, dbias = below_autograd(
            params.operators.backward,
            *(dy, x if need_a else None, xa, weight, parts or params.parts_backward),
            *(params.format, a, b, seed, params.threshold, scaling_tensor, params.scaling, wanted),
        )
    return (
        dx if need_x else None,
        _weight_gradient(dy, x) if need_weight else None,
        da if need_a else None,
        db if need_b else None,
        dbias if need_bias else None,
        *(None,) * (3 + len(parts)),
    )


def see_missing_gradients(ctx: Any) -> None:
    """Let backward get None where y has no gradient, not zeros: its parameters then have none.

    An optimizer moves a parameter whose gradient is zero, by decay and momentum.
    """
    if not is_dynamo_compiling():  # which doesn't know the call
        ctx.set_materialize_grads(False)


def none_of(ctx: Any) -> tuple[None, ...]:
    """Return the gradients of a Function's arguments where its results have none."""
    return (None,) * len(ctx.needs_input_grad)


def saved_tensors(ctx: Any, layer: str, op: str = "lora_linear") -> tuple[Any, ...]:
    """Return the saved tensors; say whose they were if one has been changed in place."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{f'LoRA layer {layer!r}' if layer else op}: expected its input and "
            "parameters as forward read them, got one that was changed in place since. It keeps "
            "no copy of its input: change a copy (x = x + 1 for x += 1) or unpatch_peft the layer, "
            "since PEFT's forward copies with dropout and with float32 adapters on 16 bits"
        ) from error


def unsaved_x(op: str, through: str = "lora_B's gradient") -> RuntimeError:
    """Return the error of a second derivative that needs x, which forward didn't save."""
    return RuntimeError(
        f"{op}: expected lora_A to require grad for a second derivative through {through}, got a "
        "frozen lora_A: x, which it needs, was not saved"
    )


def _xa_with_graph(
    x: Tensor | None, xa: Tensor | None, call: LinearCall, need_x: bool
) -> Tensor | None:
    """Return xa as a function of x and A; what forward saved is a constant to autograd."""
    if xa is None:
        return None
    if x is not None:
        rows = x.reshape(-1, x.shape[-1]).to(xa.dtype)
        return dropped(rows, call.dropout) @ call.adapter.a.to(xa.dtype).T
    if need_x:
        raise unsaved_x("lora_linear")
    return xa


def _with_gradient_of_xa(ctx, dxa, dx, dw, da):
    """Return dx, dW and dA with the share that a gradient of xa itself has in them."""
    need_x, _, need_a, _ = ctx.needs_input_grad[:4]
    x, _, _, lora_A, _, seed = ctx.saved_tensors[:6]
    dropout = None if seed is None else Dropout(seed, ctx.params.threshold)
    if need_x:
        more = dropped(dxa @ lora_A.to(dxa.dtype), dropout)
        dx = (dx + more.reshape(dx.shape)).to(dx.dtype)
    if need_a:
        rows = x.reshape(-1, x.shape[-1]).to(dxa.dtype)
        da = da + (dxa.T @ dropped(rows, dropout)).to(da.dtype)
    return dx, dw, da


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Return dW = dyᵀ x, one plain GEMM, for the rare base weight that is not frozen."""
    return dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])

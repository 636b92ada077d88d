"""What the DoRA layer saves for backward, and which gradients it returns."""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.impl.reference import dora as reference
from lora_kernels.impl.reference import linear as plain
from lora_kernels.impl.reference.mask import dropped
from lora_kernels.operands.call import LinearCall, Wanted, call_of
from lora_kernels.operands.dora import DoraCall, DoraWanted, Kept
from lora_kernels.ops.linear_gradients import (
    CallParams,
    none_of,
    saved_tensors,
    see_missing_gradients,
    unsaved_x,
)
from lora_kernels.registration import below_autograd
from lora_kernels.transforms import backward_needs_plain_torch


class LoraDoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + scaling · xa Bᵀ + (g - 1) ⊙ u with gradients of x, A, B, bias, magnitude.

    x [..., K], weight [N, K], lora_A [R, K], lora_B [N, R], bias [N] or None, magnitude [N], seed
    and scaling_tensor 0-dim or None -> y [..., N].

    Saves x, xa, u, the parameters, the norm and the seed, of x, xa and u only what the wanted
    gradients need.
    """

    @staticmethod
    def forward(ctx, *inputs):
        return _forward(ctx, *inputs)[0]

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy)


class DoraOperatorFunction(torch.autograd.Function):
    """The same for the operator itself, which returns xa, u and the norm besides."""

    @staticmethod
    def forward(ctx, *inputs):
        y, xa, u, norm = _forward(ctx, *inputs)
        ctx.mark_non_differentiable(norm)
        ctx.shape = y.shape
        return y, xa, u, norm

    @staticmethod
    def backward(ctx, dy, dxa, du, _):
        if dxa is None and du is None:
            return _gradients(ctx, dy)
        weight = ctx.saved_tensors[3]
        grads = _gradients(ctx, weight.new_zeros(ctx.shape) if dy is None else dy)
        dx, dw, da, db, *others = grads
        return _with_gradients_of_products(ctx, dxa, du, (dx, da, db), dw) + tuple(others)


def _forward(ctx, x, weight, lora_A, lora_B, bias, magnitude, seed, scaling_tensor, params):
    y, xa, u, norm = below_autograd(
        params.operators.forward,
        *(x, magnitude, weight, params.parts, params.format, lora_A, lora_B, bias, seed),
        *(params.threshold, scaling_tensor, params.scaling),
    )
    _, need_weight, need_a, need_b, _, need_m = ctx.needs_input_grad[:6]
    ctx.save_for_backward(
        x if need_a or need_weight else None,
        xa if need_b else None,
        u if need_m else None,
        *(weight, lora_A, lora_B, magnitude, norm, seed, scaling_tensor),
    )
    ctx.params = params
    see_missing_gradients(ctx)
    return y, xa, u, norm


def _saved_call(ctx: Any) -> tuple[Kept, DoraCall]:
    params: CallParams = ctx.params
    saved = saved_tensors(ctx, params.layer, "lora_dora_linear")
    x, xa, u, weight, a, b, magnitude, norm, seed, scaling_tensor = saved
    linear = call_of(
        *(weight, params.parts_backward, params.format, a, b, None, seed),
        *(params.threshold, scaling_tensor, params.scaling),
    )
    return Kept(x, xa, u, norm), DoraCall(linear, magnitude)


def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of a Function's nine arguments, None where not needed."""
    if dy is None:
        return none_of(ctx)
    need_x, need_weight, need_a, need_b, need_bias, need_m = ctx.needs_input_grad[:6]
    wanted = DoraWanted(need_x, need_a, need_b, need_bias, need_m)
    kept, call = _saved_call(ctx)
    if backward_needs_plain_torch():
        if torch.is_grad_enabled():
            kept = _with_graph(kept, call.linear, need_x)
        grads = reference.backward(dy, kept, call, wanted)
    else:
        x, xa, u, norm = kept
        grads = below_autograd(
            ctx.params.operators.backward,
            *(dy, x if need_a else None, xa, u, norm, call.magnitude),
            *(*call.linear.flat_backward(), wanted),
        )
    dx, da, db, dbias, dm = (
        grad if need else None for need, grad in zip(wanted, grads, strict=True)
    )
    dw = _weight_gradient(dy, kept, call) if need_weight else None
    return dx, dw, da, db, dbias, dm, None, None, None


def _with_graph(kept: Kept, call: LinearCall, need_x: bool) -> Kept:
    """Return xa and u as functions of x, A and B; what forward saved are constants to autograd."""
    x, xa, u, norm = kept
    if x is not None:
        _, graph_u, graph_xa = reference.products(x, call)
        return Kept(x, None if xa is None else graph_xa, None if u is None else graph_u, norm)
    if need_x and not (xa is None and u is None):
        raise unsaved_x("lora_dora_linear", "the gradient of lora_B or magnitude")
    if xa is not None and u is not None:
        b = call.adapter.b
        u = u + (xa @ (b - b.detach()).to(xa.dtype).T * call.adapter.scaling).to(u.dtype)
    return Kept(x, xa, u, norm)


def _with_gradients_of_products(
    ctx: Any, dxa: Tensor | None, du: Tensor | None, grads: Any, dw: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return dx, dW, dA and dB with the shares that gradients of xa and u have in them."""
    need_x, _, need_a, need_b = ctx.needs_input_grad[:4]
    (x, xa, _, _), (linear, _) = _saved_call(ctx)
    dropout, (a, b, _) = linear.dropout, linear.adapter
    shape = ctx.shape[:-1]
    kept = None if x is None else dropped(x.reshape(-1, x.shape[-1]), dropout).to(x.dtype)
    shares = []
    if du is not None:
        asked = Wanted(need_x, need_a, need_b, False)
        shares.append(plain.backward(du, kept, xa, linear._replace(dropout=None), asked)[:3])
    if dxa is not None:
        da = None if kept is None else dxa.T @ kept.to(dxa.dtype)
        shares.append((dxa @ a.to(dxa.dtype), da, None))
    dx, da, db = grads
    for more_x, more_a, more_b in shares:
        if need_x and more_x is not None:
            dx = (dx + dropped(more_x, dropout).reshape(*shape, -1)).to(dx.dtype)
        da = da + more_a.to(a.dtype) if need_a and more_a is not None else da
        db = db + more_b.to(b.dtype) if need_b and more_b is not None else db
    return dx, dw, da, db


def _weight_gradient(dy: Tensor, kept: Kept, call: DoraCall) -> Tensor:
    """Return dW of y with the norm constant, for the rare base weight that is not frozen."""
    assert kept.x is not None
    x, rows = kept.x.reshape(-1, kept.x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    more = ((call.gain(kept.norm) - 1) * rows).to(dy.dtype)
    return rows.T @ x + more.T @ dropped(x, call.linear.dropout).to(dy.dtype)

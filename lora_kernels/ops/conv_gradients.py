"""What the adapted convolution saves for backward, and which gradients it returns."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.impl.convolution import weight_gradient
from lora_kernels.impl.reference import conv as reference
from lora_kernels.operands.call import LinearCall, Wanted
from lora_kernels.operands.conv import Geometry, conv_call_of
from lora_kernels.ops.linear_gradients import (
    none_of,
    saved_tensors,
    see_missing_gradients,
    unsaved_x,
)
from lora_kernels.registration import Operators, below_autograd
from lora_kernels.transforms import backward_needs_plain_torch


class ConvParams(NamedTuple):
    """The other arguments of a call, one object so that backward returns one None for them."""

    operators: Operators  # of the chosen implementation
    threshold: int
    scaling: float
    geometry: Geometry
    layer: str  # the layer's path, for errors in backward


class LoraConv(torch.autograd.Function):
    """y and xa, which has no gradient of its own, with gradients of x, W, A, B and bias.

    Saves x, xa, the parameters and the seed: never a mask, never D(x); and of x and xa only what
    the wanted gradients need.
    """

    @staticmethod
    def forward(ctx, x, weight, a, b, bias, seed, scaling_tensor, params):
        both, threshold, scaling, geometry, _ = params
        y, xa = below_autograd(
            both.forward, x, weight, a, b, bias, seed, threshold, scaling_tensor, scaling, *geometry
        )
        _, need_weight, need_a, need_b = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            x if need_a or need_weight else None,
            xa if need_b else None,
            *(weight, a, b, seed, scaling_tensor),
        )
        ctx.params, ctx.size = params, x.shape
        ctx.mark_non_differentiable(xa)
        see_missing_gradients(ctx)
        return y, xa

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return none_of(ctx)
        need_x, need_weight, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
        both, threshold, scaling, geometry, layer = ctx.params
        x, xa, weight, a, b, seed, scaling_tensor = saved_tensors(ctx, layer, "lora_conv")
        wanted = Wanted(need_x, need_a, need_b, need_bias)
        others = (a, b, seed, threshold, scaling_tensor, scaling, *geometry)
        if backward_needs_plain_torch():
            call, _ = conv_call_of(weight, a, b, None, *others[2:])
            if torch.is_grad_enabled():
                xa = _xa_with_graph(x, xa, call, geometry, need_x)
            grads = reference.backward(dy, (x, xa, list(ctx.size)), call, geometry, wanted)
        else:
            needed = x if need_a else None
            grads = below_autograd(
                both.backward, dy, needed, xa, list(ctx.size), weight, *others, wanted
            )
        dx, da, db, dbias = (g if want else None for g, want in zip(grads, wanted, strict=True))
        dw = weight_gradient(x, weight, dy, geometry) if need_weight else None
        return dx, dw, da, db, dbias, None, None, None


def _xa_with_graph(
    x: Tensor | None, xa: Tensor | None, call: LinearCall, geometry: Geometry, need_x: bool
) -> Any:
    """Return xa as a function of x and A; what forward saved is a constant to autograd."""
    if xa is None:
        return None
    if x is not None:
        return reference.shrunk(x, call, geometry)
    if need_x:
        raise unsaved_x("lora_conv")
    return xa

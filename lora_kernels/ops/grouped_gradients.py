"""What the grouped LoRA linear saves for backward, and which gradients it returns."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.impl.reference import grouped as reference
from lora_kernels.operands.call import Wanted
from lora_kernels.operands.grouped import grouped_call_of
from lora_kernels.ops.linear_gradients import (
    none_of,
    saved_tensors,
    see_missing_gradients,
    unsaved_x,
)
from lora_kernels.registration import Operators, below_autograd
from lora_kernels.transforms import backward_needs_plain_torch


class Params(NamedTuple):
    """The other arguments of a call, one object so that backward returns one None for them."""

    operators: Operators
    threshold: int
    scaling: float
    layer: str = ""  # the layer's path, for errors in backward


class GroupedLoraLinear(torch.autograd.Function):
    """y and xa with gradients of x, A, B and bias; xa has none, it is for backward.

    Saves x as it is given, not its sorted rows, and xa, the parameters, who belongs to which group
    and the seed; of x and xa only what the wanted gradients need.
    """

    @staticmethod
    def forward(ctx, x, bias, weight, a, b, *others):
        *groups, seed, scaling_tensor, params = others
        y, xa = below_autograd(
            params.operators.forward,
            *(x, bias, weight, a, b, *groups, seed),
            *(params.threshold, scaling_tensor, params.scaling),
        )
        _, _, _, need_a, need_b = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_a else None,
            xa if need_b else None,
            weight,
            a,
            b,
            *groups,
            seed,
            scaling_tensor,
        )
        ctx.params, ctx.tokens = params, x.shape[0]
        ctx.mark_non_differentiable(xa)
        see_missing_gradients(ctx)
        return y, xa

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return none_of(ctx)
        need_x, need_bias, _, need_a, need_b = ctx.needs_input_grad[:5]
        wanted, params = Wanted(need_x, need_a, need_b, need_bias), ctx.params
        saved = saved_tensors(ctx, params.layer, "grouped_lora_linear")
        x, xa, *tensors, scaling_tensor = saved
        flat = (*tensors, params.threshold, scaling_tensor, params.scaling)
        if backward_needs_plain_torch():
            grads = _with_graph(dy, x, xa, grouped_call_of(None, ctx.tokens, *flat), wanted)
        else:
            grads = below_autograd(
                params.operators.backward, dy, x, xa, ctx.tokens, *flat, tuple(wanted)
            )
        dx, da, db, dbias = (
            grad if want else None for grad, want in zip(grads, wanted, strict=True)
        )
        # For weight, and beside A and B for the five of Groups, seed, scaling and params.
        return dx, dbias, None, da, db, *(None,) * 8


def _with_graph(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: Any, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """Return the gradients by torch's own operators, and xa with its graph: saved, it is constant.

    Raises:
        RuntimeError: a second derivative needs x, which wasn't saved.
    """
    if torch.is_grad_enabled() and xa is not None:
        if x is None:
            raise unsaved_x("grouped_lora_linear")
        xa = reference.forward(x, call)[1]
    return reference.backward(dy, x, xa, call, wanted)

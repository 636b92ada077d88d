"""What the adapted linear layer saves for backward, and which gradients it returns."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class CallParams(NamedTuple):
    """The non-tensor arguments of a call, one object so that backward returns one None for them."""

    forward: Any  # operator handles of the chosen implementation
    backward: Any
    scaling: float
    threshold: int


class LoraLinearFunction(torch.autograd.Function):
    """y = x Wᵀ + bias + scaling · D(x) Aᵀ Bᵀ with gradients of x, A, B and bias.

    x [..., K], weight [N, K], lora_A [R, K], lora_B [N, R], bias [N] or None, seed and
    scaling_tensor 0-dim or None -> y [..., N].

    Saves x, xa, the parameters and the seed: never a mask, never D(x); and of x and xa only what
    the wanted gradients need.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, seed, scaling_tensor, params):
        y, xa = params.forward(
            x, weight, lora_A, lora_B, bias, seed, scaling_tensor, params.scaling, params.threshold
        )
        _, need_weight, need_a, need_b = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            x if need_a or need_weight else None,
            xa if need_b else None,
            weight,
            lora_A,
            lora_B,
            seed,
            scaling_tensor,
        )
        ctx.params = params
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, xa, weight, lora_A, lora_B, seed, scaling_tensor = ctx.saved_tensors
        params: CallParams = ctx.params
        need_x, need_weight, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
        dx, da, db, dbias = params.backward(
            dy,
            x if need_a else None,
            xa,
            weight,
            lora_A,
            lora_B,
            seed,
            scaling_tensor,
            params.scaling,
            params.threshold,
            (need_x, need_a, need_b, need_bias),
        )
        return (
            dx if need_x else None,
            _weight_gradient(dy, x) if need_weight else None,
            da if need_a else None,
            db if need_b else None,
            dbias if need_bias else None,
            None,
            None,
            None,
        )


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Return dW = dyᵀ x, one plain GEMM, for the rare base weight that is not frozen."""
    return dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])

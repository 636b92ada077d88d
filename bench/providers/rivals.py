"""What others do, behind one signature: x, W, A, B, scaling, p -> y.

`addmm_lora` is the strong baseline: in-place addmm in the order of Unsloth's and Axolotl's
Functions, which add the adapter into the base product's result instead of adding two [M, N]
tensors, and save x alone. Written from the description of that order; their code is not used.

The packages are no requirement: each is imported when it is called, and `providers` asks first
whether it is installed. They take x as [batch, sequence, K].
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout, linear


def addmm_lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, p: float) -> Tensor:
    """Return y = x Wᵀ + scaling · D(x) Aᵀ Bᵀ; dropout is torch's, outside of the Function."""
    return AddmmLora.apply(x, dropout(x, p) if p else None, weight, a, b, scaling)


class AddmmLora(Function):
    """The layer with an explicit backward; `dropped` is D(x), None without dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        """Return y; adapters of another dtype are cast to x's, once."""
        a16, b16 = a.to(x.dtype), b.to(x.dtype)
        y = linear(x, weight)
        xa = (x if dropped is None else dropped).flatten(0, -2) @ a16.T
        y.view(-1, y.shape[-1]).addmm_(xa, b16.T, alpha=scaling)
        ctx.save_for_backward(x, dropped, weight, a16, b16)
        ctx.scaling, ctx.adapters = scaling, a.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, the gradient of D(x), None for W, dA and dB; D(x) Aᵀ is computed again."""
        x, dropped, weight, a, b = ctx.saved_tensors
        dy2, x2 = dy.flatten(0, -2), (x if dropped is None else dropped).flatten(0, -2)
        dyb = dy2 @ b
        da = (dyb.T @ x2).mul_(ctx.scaling).to(ctx.adapters)
        db = (dy2.T @ (x2 @ a.T)).mul_(ctx.scaling).to(ctx.adapters)
        dx = dropped_grad = None
        if ctx.needs_input_grad[0]:
            dx = dy2 @ weight
            if dropped is None:
                dx.addmm_(dyb, a, alpha=ctx.scaling)
            else:
                dropped_grad = (dyb @ a).mul_(ctx.scaling).view_as(x)
            dx = dx.view_as(x)
        return dx, dropped_grad, None, da, db, None


def unsloth_lora(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, p: float
) -> Tensor:
    """Compute the layer by Unsloth's Function for one projection; it knows no dropout."""
    from unsloth.kernels.fast_lora import LoRA_W

    return _in_three_dims(x, lambda x3: LoRA_W.apply(x3, weight, None, a, b, scaling))


def lorafusion_lora(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, p: float
) -> Tensor:
    """Compute the layer by LoRAFusion's kernels."""
    from lorafusion.ops.lora_v1 import fused_linear_lora

    # Its backward reads a mask, which it makes only for p > 0; so little drops nothing.
    p = p or 1e-9
    return _in_three_dims(
        x, lambda x3: fused_linear_lora(x3, weight, a, b, alpha=scaling, dropout_p=p)
    )


def liger_model(module: Any) -> nn.Module:
    """Replace a Llama's norms, gated MLP and loss by Liger's; the LoRA layers stay PEFT's."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    # It also replaces names of transformers, which models of other providers are built from.
    # Its rotation would be one of them, called at each forward, so that is left out.
    names = dict(vars(modeling_llama))
    try:
        apply_liger_kernel_to_llama(rope=False, model=module.get_base_model())
    finally:
        vars(modeling_llama).update(names)
    return module


def _in_three_dims(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    return layer(x) if x.ndim == 3 else layer(x.unsqueeze(0)).squeeze(0)

"""What the adapted linear layer saves for backward, and which gradients it returns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.autograd import forward_ad

from lora_kernels.impl.reference import linear as reference
from lora_kernels.impl.reference.mask import dropout
from lora_kernels.transforms import counts_flops, in_functorch

_BelowAutograd = torch._C._AutoDispatchBelowAutograd


class CallParams(NamedTuple):
    """The non-tensor arguments of a call, one object so that backward returns one None for them."""

    forward: Any  # operator handles of the chosen implementation
    backward: Any
    scaling: float
    threshold: int
    layer: str = ""  # the layer's path, for errors in backward


def below_autograd(operator: Callable[..., Any], *args: Any) -> Any:
    """Call an operator past its autocast and autograd kernels, for callers that did their work.

    It takes less time than torch's fallback did for operators without such kernels.
    """
    if torch.compiler.is_dynamo_compiling():  # which records operators by itself
        return operator(*args)
    if _is_any_autocast_enabled():
        with _BelowAutograd(), torch._C._DisableAutocast():
            return operator(*args)
    with _BelowAutograd():
        return operator(*args)


class LoraLinearFunction(torch.autograd.Function):
    """y = x Wᵀ + bias + scaling · D(x) Aᵀ Bᵀ with gradients of x, A, B and bias.

    x [..., K], weight [N, K], lora_A [R, K], lora_B [N, R], bias [N] or None, seed and
    scaling_tensor 0-dim or None -> y [..., N].

    Saves x, xa, the parameters and the seed: never a mask, never D(x); and of x and xa only what
    the wanted gradients need.
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
        ctx.set_materialize_grads(False)
        ctx.shape = y.shape
        return y, xa

    @staticmethod
    def backward(ctx, dy, dxa):
        weight = ctx.saved_tensors[2]
        grads = _gradients(ctx, weight.new_zeros(ctx.shape) if dy is None else dy)
        if dxa is None:
            return grads
        return *_with_gradient_of_xa(ctx, dxa, *grads[:3]), *grads[3:]


def _forward(ctx, x, weight, lora_A, lora_B, bias, seed, scaling_tensor, params):
    y, xa = below_autograd(
        params.forward,
        *(x, weight, lora_A, lora_B, bias, seed, scaling_tensor),
        *(params.scaling, params.threshold),
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
    return y, xa


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of a Function's eight arguments, None where not needed."""
    need_x, need_weight, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
    needs = (need_x, need_a, need_b, need_bias)
    params: CallParams = ctx.params
    x, xa, weight, lora_A, lora_B, seed, scaling_tensor = _saved(ctx, params.layer)
    if _needs_plain_torch():
        if torch.is_grad_enabled():
            xa = _xa_with_graph(ctx, x, xa, lora_A, seed)
        scale = params.scaling if scaling_tensor is None else scaling_tensor
        dx, da, db, dbias = reference.lora_linear_backward(
            dy, x, xa, weight, lora_A, lora_B, seed, scale, params.threshold, list(needs)
        )
    else:
        dx, da, db, dbias = below_autograd(
            params.backward,
            *(dy, x if need_a else None, xa, weight, lora_A, lora_B, seed, scaling_tensor),
            *(params.scaling, params.threshold, needs),
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


def _saved(ctx: Any, layer: str) -> tuple[Any, ...]:
    """Return the saved tensors; say whose they were if one has been changed in place."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{f'LoRA layer {layer!r}' if layer else 'lora_linear'}: expected its input and "
            "parameters as forward read them, got one that was changed in place since. It keeps "
            "no copy of its input: change a copy (x = x + 1 for x += 1) or unpatch_peft the layer, "
            "since PEFT's forward copies with dropout and with float32 adapters on 16 bits"
        ) from error


def _needs_plain_torch() -> bool:
    """Whether backward is recorded (create_graph), mapped, counted, or dy may have a tangent."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return (
        torch.is_grad_enabled()
        or in_functorch()
        or forward_ad._current_level >= 0
        or counts_flops()
    )


def _xa_with_graph(
    ctx: Any, x: Tensor | None, xa: Tensor | None, lora_A: Tensor, seed: Tensor | None
) -> Tensor | None:
    """Return xa as a function of x and A; what forward saved is a constant to autograd."""
    if xa is None:
        return None
    if x is not None:
        rows = x.reshape(-1, x.shape[-1]).to(xa.dtype)
        return dropout(rows, ctx.params.threshold, seed) @ lora_A.to(xa.dtype).T
    if ctx.needs_input_grad[0]:
        raise RuntimeError(
            "lora_linear: expected lora_A to require grad for a second derivative through lora_B's "
            "gradient, got a frozen lora_A: x, which it needs, was not saved"
        )
    return xa


def _with_gradient_of_xa(ctx, dxa, dx, dw, da):
    """Return dx, dW and dA with the share that a gradient of xa itself has in them."""
    need_x, _, need_a, _ = ctx.needs_input_grad[:4]
    x, _, _, lora_A, _, seed, _ = ctx.saved_tensors
    threshold = ctx.params.threshold
    if need_x:
        more = dropout(dxa @ lora_A.to(dxa.dtype), threshold, seed)
        dx = (dx + more.reshape(dx.shape)).to(dx.dtype)
    if need_a:
        rows = x.reshape(-1, x.shape[-1]).to(dxa.dtype)
        da = da + (dxa.T @ dropout(rows, threshold, seed)).to(da.dtype)
    return dx, dw, da


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Return dW = dyᵀ x, one plain GEMM, for the rare base weight that is not frozen."""
    return dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])

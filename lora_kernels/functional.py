"""The public functions: what may be passed, what comes back, and at which precision."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from lora_kernels.autograd import CallParams, LoraLinearFunction, below_autograd
from lora_kernels.checks import (
    check_dropout_p,
    check_lora_linear,
    check_memory,
    check_scaling,
    check_seed,
    is_dtensor,
    scaling_for,
)
from lora_kernels.dispatch import (
    Implementation,
    check_impl,
    choose,
)
from lora_kernels.impl.reference import linear as reference
from lora_kernels.impl.reference.mask import keep_mask
from lora_kernels.operands.dropout import LEVELS, drop_threshold
from lora_kernels.ops import implement
from lora_kernels.packing import Packed
from lora_kernels.transforms import needs_plain_torch


def lora_linear(
    x: Tensor,
    weight: Tensor,
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
            computed by one plain matmul.
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
    cast = autocast_dtype(x)
    check_lora_linear(x, weight, lora_A, lora_B, bias, cast=cast)
    check_scaling(scaling)
    scaling = scaling_for(scaling, x.device)
    check_dropout_p(dropout_p)
    check_seed(seed, x.device)
    p = dropout_p if training else 0.0
    if needs_plain_torch():
        return _by_plain_torch(x, weight, lora_A, lora_B, bias, scaling, p, seed, impl)
    return checked_lora_linear(x, weight, lora_A, lora_B, bias, scaling, p, seed, impl, cast)


def checked_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    dropout_p: float,
    seed: int | Tensor | None,
    impl: str,
    cast: torch.dtype | None,
    packed: Packed | None = None,
    layer: str = "",
) -> Tensor:
    """Compute `lora_linear` for arguments known to fit each other.

    cast: `autocast_dtype(x)`. packed: `weight` as the compiled CPU part may take it besides.
    layer: the layer's path, which an error in backward names.
    """
    if cast is not None:
        check_memory(x=x, weight=weight, bias=bias)
        x, weight = x.to(cast), weight.to(cast)
        bias = None if bias is None else bias.to(cast)
    if bias is not None and not bias.is_contiguous():
        check_memory(bias=bias)
        bias = bias.contiguous()  # oneDNN's linear reads a strided one as if it were not

    threshold = drop_threshold(dropout_p) if dropout_p else 0
    key = _seed_tensor(seed, x.device) if threshold else None
    if is_dtensor(x):
        from lora_kernels.sharding import sharded_call

        shards = sharded_call(x, weight, lora_A, lora_B, bias, key)
        weight, lora_A, lora_B, bias, key = shards
    scaling_tensor = scaling if isinstance(scaling, Tensor) else None
    number = 1.0 if isinstance(scaling, Tensor) else float(scaling)
    if torch.compiler.is_exporting():
        return torch.ops.lora_kernels.lora_linear.default(
            x, weight, lora_A, lora_B, bias, key, scaling_tensor, number, threshold, impl
        )
    chosen: Implementation | Packed
    impl = preferred(impl, x, weight, threshold > 0)
    chosen = choose(impl, x.device, x.dtype, lora_A.shape[0], threshold > 0)
    if packed is not None and packed.serves(chosen.name, weight.dtype):
        chosen = packed
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, lora_A, lora_B, bias):
        params = CallParams(chosen.forward, chosen.backward, number, threshold, layer)
        return LoraLinearFunction.apply(
            x, weight, lora_A, lora_B, bias, key, scaling_tensor, params
        )
    y, _ = below_autograd(
        chosen.forward, x, weight, lora_A, lora_B, bias, key, scaling_tensor, number, threshold
    )
    return y


def _exported(
    x, weight, lora_A, lora_B, bias, seed, scaling_tensor, scaling, threshold, impl
) -> Tensor:
    """Be the body of the operator that torch.export records, run or decomposed."""
    scale = scaling if scaling_tensor is None else scaling_tensor
    if not torch.compiler.is_exporting():
        p = threshold / LEVELS
        if needs_plain_torch():
            return _by_plain_torch(x, weight, lora_A, lora_B, bias, scale, p, seed, impl)
        return checked_lora_linear(x, weight, lora_A, lora_B, bias, scale, p, seed, impl, None)
    if _compiles_ahead():
        chosen = choose(impl, x.device, x.dtype, lora_A.shape[0], threshold > 0)
        return chosen.forward(
            x, weight, lora_A, lora_B, bias, seed, scaling_tensor, scaling, threshold
        )[0]
    forward = reference.lora_linear_forward
    return forward(x, weight, lora_A, lora_B, bias, seed, scale, threshold)[0]


def _compiles_ahead() -> bool:
    """Whether AOTInductor traces an exported program, whose packages keep the fused operators."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and bool(virtualized.V.aot_compilation)


implement("lora_linear", _exported, "CompositeImplicitAutograd")


def _by_plain_torch(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    dropout_p: float,
    seed: int | Tensor | None,
    impl: str,
) -> Tensor:
    """Compute the reference's formulas, which torch differentiates, maps and traces by itself."""
    check_impl(impl)
    if impl not in ("auto", "reference"):
        raise ValueError(
            f"impl: {impl!r} can't serve this call: inside torch.func transforms, forward-mode "
            'differentiation, traces and FLOP counts "auto" and "reference" compute by torch\'s '
            "own operators"
        )
    cast = autocast_dtype(x)
    if cast is not None:
        x, weight = x.to(cast), weight.to(cast)
        bias = None if bias is None else bias.to(cast)
    threshold = drop_threshold(dropout_p)
    key = _seed_tensor(seed, x.device) if threshold else None
    forward = reference.lora_linear_forward
    return forward(x, weight, lora_A, lora_B, bias, key, scaling, threshold)[0]


def dropout_mask(
    shape: Sequence[int],
    dropout_p: float,
    seed: int | Tensor,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the keep mask that a `lora_linear` call with this seed uses::

        D(x) = x · mask · 65536 / (65536 - t),  t = min(round(65536 p), 65535)

    Args:
        shape: shape of x, [..., K]; at least one dimension.
        dropout_p: probability in [0, 1).
        seed: the call's seed, a signed 64-bit int or a 0-dim int64 tensor on `device`.
        device: where the mask is made; its values don't depend on it.

    Returns:
        bool tensor of `shape`, True where the element is kept.

    Raises:
        TypeError, ValueError: an argument outside what is said above.

    Source: Philox-4x32-10 of Salmon et al., Parallel random numbers, SC'11; how elements map to its
    lanes is said in `impl/reference/mask.py`.

    Example:
        >>> lk.dropout_mask((1, 6), 0.5, seed=7)
        tensor([[False,  True,  True,  True,  True, False]])
        >>> x, a, b = torch.ones(1, 6), torch.ones(1, 6), torch.ones(1, 1)
        >>> lk.lora_linear(x, torch.zeros(1, 6), a, b, dropout_p=0.5, training=True, seed=7)
        tensor([[8.]])
    """
    dims = tuple(shape)
    if not dims or any(isinstance(d, bool) or not isinstance(d, int) or d < 0 for d in dims):
        raise ValueError(f"shape: expected at least one non-negative int, got {shape!r}")
    check_dropout_p(dropout_p)
    if seed is None:
        raise TypeError("seed: expected an int or a 0-dim int64 tensor, got None")
    check_seed(seed, torch.empty(0, device=device).device)
    rows = 1
    for d in dims[:-1]:
        rows *= d
    mask = keep_mask(rows, dims[-1], drop_threshold(dropout_p), seed, device)
    return mask.reshape(dims)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast asks of x's device; None outside autocast and for float64."""
    if not torch.compiler.is_dynamo_compiling() and not _is_any_autocast_enabled():
        return None
    if not isinstance(x, Tensor) or x.dtype == torch.float64:
        return None
    device = x.device.type
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):
        return None
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def preferred(impl: str, x: Tensor, weight: Tensor, dropout: bool) -> str:
    """Return "eager" in place of "auto" where kernels would copy W at each call.

    Those of GPUs read W by rows; torch's products read it as it lies. A mask drawn by torch's
    operators costs more than the copy.
    """
    if impl != "auto" or dropout or x.is_cpu or x.is_meta:
        return impl
    return "eager" if weight.stride(0) == 1 != weight.stride(1) else impl


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(0, 1 << 62, (), dtype=torch.int64, device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)


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

"""The adapted linear layer in plain torch: the definition of right.

Any device, any float dtype, float64 included. Nothing here is tuned: where this file and a
kernel disagree beyond the error budget, the kernel is wrong. float16 decides how numbers are
rounded, not their range: what lies between x and y, or dy and a gradient, is kept in float32.

Notation: M tokens, N out_features, K in_features, R rank.

    forward    y  = x Wᵀ + bias + scaling · xa Bᵀ        xa  = D(x) Aᵀ
    backward   dx = dy W + D(dxa A)                      dxa = scaling · dy B
               dA = dxaᵀ D(x)
               dB = scaling · dyᵀ xa
               dbias = Σ_m dy

D(v) = v · keep · 65536 / (65536 - t) with one keep mask per call (`mask.keep_mask`).
"""

import torch
from torch import Tensor

from lora_kernels.impl.reference.mask import dropout
from lora_kernels.operands.precision import has_wide_branch


def _as_matrix(v: Tensor) -> Tensor:
    """Return v [..., C] as contiguous [M, C].

    On CPUs with AMX torch's bf16 products read on beyond rows that lie apart (oneDNN 3.12): by a
    zero, but a NaN there spreads.
    """
    return v.reshape(-1, v.shape[-1]).contiguous()


def rounded(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Return v rounded to dtype; of float16 its 11 significant bits alone, as float32 numbers."""
    if dtype != torch.float16:
        return v.to(dtype)
    mantissa, exponent = torch.frexp(v.float())
    return torch.ldexp(mantissa.half().float(), exponent)


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float | Tensor,
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """Return y = x Wᵀ + bias + scaling · xa Bᵀ and xa = D(x) Aᵀ.

    Args:
        x: [..., K]; leading dimensions are flattened to M.
        weight: [N, K], x's dtype.
        lora_A: [R, K], any float dtype; `rounded` to x's.
        lora_B: [N, R], likewise.
        bias: [N] or None.
        seed: 0-dim int64, the Philox key; None without dropout.
        scaling: a float or a 0-dim tensor.
        threshold: the drop threshold in 1/65536; 0 without dropout.

    Returns:
        y [..., N] in x's dtype; xa [M, R] too, float32 where adapters beside float16 are wider.
    """
    a, b = rounded(lora_A, x.dtype), rounded(lora_B, x.dtype)
    x2 = _as_matrix(x)
    xa = dropout(x2.to(a.dtype), threshold, seed) @ a.T
    xa = rounded(xa, x.dtype) if has_wide_branch(x, lora_A, lora_B) else xa.to(x.dtype)
    y = x2 @ weight.T + (xa.to(b.dtype) @ b.T) * scaling
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0]), xa


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float | Tensor,
    threshold: int,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return dx [..., K], dA [R, K], dB [N, R] and dbias [N], each None where not needed.

    Args:
        dy: [..., N], the gradient of y.
        x: [..., K], needed for dA only.
        xa: [M, R] of the forward call, needed for dB only.
        weight, lora_A, lora_B, seed, scaling, threshold: as in forward.
        needs: whether dx, dA, dB and dbias are wanted, in this order.

    Returns:
        dx and dbias in dy's dtype, dA and dB in their parameters' dtypes.
    """
    a, b = rounded(lora_A, dy.dtype), rounded(lora_B, dy.dtype)
    dy2 = _as_matrix(dy)
    wide = dy2.to(b.dtype)
    dxa = rounded((wide @ b) * scaling, dy.dtype)
    dx = da = db = dbias = None
    if needs[0]:
        dx = dy2 @ weight + dropout(dxa @ a, threshold, seed)
        dx = dx.to(dy.dtype).reshape(*dy.shape[:-1], weight.shape[1])
    if needs[1]:
        assert x is not None
        da = (dxa.T @ dropout(_as_matrix(x).to(a.dtype), threshold, seed)).to(lora_A.dtype)
    if needs[2]:
        assert xa is not None
        db = ((wide.T @ xa.to(b.dtype)) * scaling).to(lora_B.dtype)
    if needs[3]:
        dbias = dy2.sum(0)
    return dx, da, db, dbias

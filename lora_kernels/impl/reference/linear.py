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

from lora_kernels.impl.reference.mask import dropped
from lora_kernels.operands.call import Gradients, LinearCall, Wanted
from lora_kernels.operands.precision import has_wide_branch


def as_matrix(v: Tensor) -> Tensor:
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


def forward(x: Tensor, call: LinearCall) -> tuple[Tensor, Tensor]:
    """Return y = x Wᵀ + bias + scaling · xa Bᵀ and xa = D(x) Aᵀ.

    Args:
        x: [..., K]; leading dimensions are flattened to M.
        call: W and bias in x's dtype; A and B of any float dtype, `rounded` to x's.

    Returns:
        y [..., N] in x's dtype; xa [M, R] too, float32 where adapters beside float16 are wider.
    """
    weight, adapter = call.weight.decode(x.dtype), call.adapter
    a, b = rounded(adapter.a, x.dtype), rounded(adapter.b, x.dtype)
    x2 = as_matrix(x)
    xa = dropped(x2.to(a.dtype), call.dropout) @ a.T
    xa = rounded(xa, x.dtype) if has_wide_branch(x, adapter) else xa.to(x.dtype)
    y = x2 @ weight.T + (xa.to(b.dtype) @ b.T) * adapter.scaling
    if call.bias is not None:
        y = y + call.bias
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0]), xa


def backward(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: LinearCall, wanted: Wanted
) -> Gradients:
    """Return dx [..., K], dA [R, K], dB [N, R] and dbias [N], each None where not wanted.

    Args:
        dy: [..., N], the gradient of y.
        x: [..., K], needed for dA only.
        xa: [M, R] of the forward call, needed for dB only.
        call: as in forward; its bias is not read.
        wanted: which gradients are.

    Returns:
        dx and dbias in dy's dtype, dA and dB in their parameters' dtypes.
    """
    lora_A, lora_B, scaling = call.adapter
    a, b = rounded(lora_A, dy.dtype), rounded(lora_B, dy.dtype)
    dy2 = as_matrix(dy)
    wide = dy2.to(b.dtype)
    dxa = rounded((wide @ b) * scaling, dy.dtype)
    dx = da = db = dbias = None
    if wanted.dx:
        weight = call.weight.decode(dy.dtype)
        dx = dy2 @ weight + dropped(dxa @ a, call.dropout)
        dx = dx.to(dy.dtype).reshape(*dy.shape[:-1], weight.shape[1])
    if wanted.da:
        assert x is not None
        da = (dxa.T @ dropped(as_matrix(x).to(a.dtype), call.dropout)).to(lora_A.dtype)
    if wanted.db:
        assert xa is not None
        db = ((wide.T @ xa.to(b.dtype)) * scaling).to(lora_B.dtype)
    if wanted.dbias:
        dbias = dy2.sum(0)
    return Gradients(dx, da, db, dbias)

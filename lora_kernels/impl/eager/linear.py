"""The adapted linear layer in few, in-place ATen calls: any device, the default without a kernel.

Same equations and signatures as `reference`. What differs is what passes over memory: the scale is
applied to [M, R] tensors, products are added in place, and dropout works on blocks of rows with a
regenerated mask, so that beyond its outputs a call holds [M, R] tensors and one block.

Of float16 no product by the scale or dropout's factor is stored: it could leave the range. Forward
leaves both to the matrix products; backward forms what follows from dy B in float32, by blocks, and
so does forward what follows from D(x) on CPUs, where wider adapters give it a longer range.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels.impl.eager.mask import keep_blocks, masked
from lora_kernels.impl.eager.products import (
    as_dtype,
    as_matrix,
    base_gradient,
    base_linear,
    blocks,
    left_operand,
)
from lora_kernels.operands.call import Adapter, Gradients, LinearCall, Wanted
from lora_kernels.operands.dropout import Dropout
from lora_kernels.operands.precision import has_wide_branch

# Up to here a scaling pass over [M, R] costs more (5 µs a call) than a scaled product does.
SMALL_M = 32
# 2026-11-24, Zen 4, bf16, 2 threads, dB of 2048x768: 0.19 ms transposed, 0.24 straight; at
# 512x2048 0.16 and 0.20, but a copy of the result adds 0.035.
TALL_M = 1024


def forward(x: Tensor, call: LinearCall) -> tuple[Tensor, Tensor]:
    """Return y [..., N] and xa [M, R]; see `reference`.

    Precision: products accumulate as torch's matmul does (float32 for 16-bit inputs); x Wᵀ, y and
    xa are rounded to x's dtype, xa again after dropout's factor and after scaling (M > SMALL_M),
    float16's by neither.
    """
    if has_wide_branch(x, call.adapter):
        return _wide_forward(x, call)
    x2 = left_operand(x)
    a = as_dtype(call.adapter.a, x.dtype)
    half = x.dtype == torch.float16
    if call.dropout is None:
        xa = linear(x2, a)
    else:
        xa = x2.new_empty(x2.shape[0], a.shape[0])
        factor = call.dropout.scale
        for rows, keep in keep_blocks(x2.shape[0], x2.shape[1], call.dropout):
            kept, to = masked(x2[rows], keep), xa[rows]
            if half:
                torch.addmm(to, kept, a.t(), beta=0, alpha=factor, out=to)
            else:
                torch.mm(kept, a.t(), out=to)
        if not half:
            xa.mul_(factor)
    y = base_linear(x2, call)
    expand_(y, xa, call.adapter)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1]), xa


def backward(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: LinearCall, wanted: Wanted
) -> Gradients:
    """Return dx, dA, dB, dbias; see `reference`.

    Precision: as forward; dA is summed over row blocks in float32 (float64 for float64). With
    float16 dy lora_A and lora_B keep their own precision, and dy B, dA and dB are float32.
    """
    lora_A, lora_B, scaling = call.adapter
    dy2 = left_operand(dy)
    x2 = as_matrix(x) if wanted.da and x is not None else None
    dx = base_gradient(dy2, call.weight.decode(dy.dtype)) if wanted.dx else None
    da = db = None
    if dy.dtype == torch.float16:
        da, db = _wide_backward(dx, dy2, x2, xa if wanted.db else None, call)
    elif wanted.dx or wanted.da:
        a = as_dtype(lora_A, dy.dtype)
        q = torch.mm(dy2, as_dtype(lora_B, dy.dtype)).mul_(scaling)
        if call.dropout is None:
            if dx is not None:
                dx.addmm_(q, a)
            if x2 is not None:
                da = torch.mm(q.t(), x2)
        else:
            q.mul_(call.dropout.scale)
            da = _dropped_backward(dx, x2, q, a, call.dropout)
    if wanted.db and xa is not None and db is None:
        db = _tall_product(dy2, xa * scaling)
    return Gradients(
        dx.view(*dy.shape[:-1], dx.shape[1]) if dx is not None else None,
        as_dtype(da, lora_A.dtype) if da is not None else None,
        as_dtype(db, lora_B.dtype) if db is not None else None,
        dy2.sum(0) if wanted.dbias else None,
    )


def _wide_forward(x: Tensor, call: LinearCall) -> tuple[Tensor, Tensor]:
    """Return y in x's dtype and xa, which is float32, as are all of the branch's products."""
    adapter, dropout, x2 = call.adapter, call.dropout, as_matrix(x)
    a, b = adapter.a.float(), adapter.b.float()
    y = base_linear(x2, call)
    xa = x2.new_empty((x2.shape[0], a.shape[0]), dtype=torch.float32)
    for rows, keep in blocks(x2.shape[0], x2.shape[1], dropout):
        kept = x2[rows] if keep is None else masked(x2[rows], keep)
        torch.mm(kept.float(), a.t(), out=xa[rows])
        if dropout is not None:
            xa[rows].mul_(dropout.scale)
        y[rows].add_(torch.mm(xa[rows] * adapter.scaling, b.t()))
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1]), xa


def _dropped_backward(
    dx: Tensor | None, x2: Tensor | None, q: Tensor, a: Tensor, dropout: Dropout
) -> Tensor | None:
    """Add keep · (q A) to dx in place and return qᵀ (keep · x); q carries both scales."""
    wide = torch.promote_types(q.dtype, torch.float32)
    da = torch.zeros(a.shape, dtype=wide, device=a.device) if x2 is not None else None
    for rows, keep in keep_blocks(q.shape[0], a.shape[1], dropout):
        if dx is not None:
            t = torch.mm(q[rows], a)
            dx[rows].add_(masked(t, keep, out=t))
        if x2 is not None and da is not None:
            da.add_(torch.mm(q[rows].t(), masked(x2[rows], keep)))
    return da


def _wide_backward(
    dx: Tensor | None, dy2: Tensor, x2: Tensor | None, xa: Tensor | None, call: LinearCall
) -> tuple[Tensor | None, Tensor | None]:
    """Add D(dxa A) to dx in place and return dA and dB, float32, each None without its input."""
    lora_A, lora_B, scaling = call.adapter
    a, b, dropout = lora_A.float(), lora_B.float(), call.dropout
    da = torch.zeros_like(a) if x2 is not None else None
    db = torch.zeros_like(b) if xa is not None else None
    scale = scaling if dropout is None else scaling * dropout.scale
    for rows, keep in blocks(dy2.shape[0], a.shape[1], dropout):
        dy_rows = dy2[rows].float()
        q = torch.mm(dy_rows, b).mul_(scale)
        if dx is not None:
            t = torch.mm(q, a)
            dx[rows].add_(t if keep is None else masked(t, keep, out=t))
        if x2 is not None and da is not None:
            kept = x2[rows] if keep is None else masked(x2[rows], keep)
            da.addmm_(q.t(), kept.float())
        if xa is not None and db is not None:
            db.addmm_(dy_rows.t(), xa[rows].float())
    return da, db if db is None else db.mul_(scaling)


def expand_(y: Tensor, xa: Tensor, adapter: Adapter) -> None:
    """Add scaling · xa Bᵀ to y, whose dtype is xa's or float16."""
    b, scaling = as_dtype(adapter.b, xa.dtype), adapter.scaling
    half = y.dtype == torch.float16
    if xa.dtype != y.dtype or (half and isinstance(scaling, Tensor)):
        for rows, _ in blocks(y.shape[0], y.shape[1], None):
            y[rows].add_(torch.mm(xa[rows].float() * scaling, b.float().t()))
    elif (half or y.shape[0] <= SMALL_M) and not isinstance(scaling, Tensor):
        y.addmm_(xa, b.t(), alpha=scaling)
    else:
        y.addmm_(xa * scaling, b.t())


def _tall_product(dy: Tensor, xs: Tensor) -> Tensor:
    """Return dyᵀ xs, formed as (xsᵀ dy)ᵀ where M is large enough to pay for the copy to come."""
    if dy.shape[0] >= TALL_M:
        return torch.mm(xs.t(), dy).t()
    return torch.mm(dy.t(), xs)

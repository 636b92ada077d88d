"""The DoRA layer in few ATen calls; equations and signatures are `reference`'s.

The norm's square is summed from products with A (R / K of the time of a product with W):

    n² = ‖w‖² + 2 s b·(A w) + s² b (A Aᵀ) bᵀ        of a row w of W, b of B

Where W and s B A all but cancel, digits do, too: such rows are formed again as they are.

Source: the factored norm of arXiv:2603.22276.
"""

import torch
from torch import Tensor

from lora_kernels.impl.eager import linear as plain
from lora_kernels.impl.eager.mask import keep_blocks, masked
from lora_kernels.impl.eager.products import (
    as_dtype,
    as_matrix,
    base_gradient,
    blocks,
    left_operand,
)
from lora_kernels.operands.call import LinearCall, Wanted
from lora_kernels.operands.dora import DoraCall, DoraGradients, DoraWanted, Kept
from lora_kernels.operands.precision import has_wide_branch

# Of ‖w‖² + ‖s b A‖²: float32's n is off by up to 4e-6 above it, and by 2e-5 where 1e-2 is left
# (2026-12-01, Xeon with AMX, 150 draws of 256 rows).
CANCELLED = 5e-2


def row_norms(call: LinearCall) -> Tensor:
    """Return n [N], float32 or of float64 float64.

    On other devices than CPUs every row is formed: to ask for those that cancel would wait for the
    GPU, which graphs of it can't.
    """
    weight, (a, b, scaling) = call.weight.decode(), call.adapter
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = as_dtype(a, wide), as_dtype(b, wide) * scaling
    if not weight.is_cpu:
        return _formed_norms(weight, a, b)
    own, product = weight.new_empty(b.shape[:1], dtype=wide), torch.empty_like(b)
    for rows, _ in blocks(weight.shape[0], weight.shape[1], None):
        w = as_dtype(weight[rows], wide)
        torch.linalg.vecdot(w, w, out=own[rows])
        torch.mm(w, a.t(), out=product[rows])
    update = torch.linalg.vecdot(torch.mm(b, torch.mm(a, a.t())), b)
    square = own + 2 * torch.linalg.vecdot(product, b) + update
    cancelled = (square < CANCELLED * (own + update)).nonzero().flatten()
    norm = square.clamp_(min=0).sqrt_()
    if cancelled.numel():
        norm[cancelled] = _formed_norms(weight[cancelled], a, b[cancelled])
    return norm


def _formed_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    norm = b.new_empty(b.shape[0])
    for rows, _ in blocks(weight.shape[0], weight.shape[1], None):
        total = torch.addmm(as_dtype(weight[rows], b.dtype), b[rows], a)
        torch.linalg.vector_norm(total, dim=1, out=norm[rows])
    return norm


def forward(x: Tensor, call: DoraCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y [..., N], xa [M, R], u [M, N] and n [N]; see `reference`.

    Precision: as `linear`'s; u is rounded to x's dtype, g is not: y is formed of both in g's dtype
    and rounded once. Beside wider adapters all products of a float16 x are float32, and so is u.
    """
    linear = call.linear
    norm = row_norms(linear)
    gain = call.gain(norm)
    if has_wide_branch(x, linear.adapter):
        y, xa, u = _wide_forward(x, linear, gain)
        return y.view(*x.shape[:-1], y.shape[1]), xa, u, norm
    x2 = left_operand(x)
    starts = call.starts(gain)
    z, xa = plain.forward(x2, linear._replace(bias=None))
    u = z if linear.dropout is None else _dropped_product(x2, xa, linear)
    if starts and linear.bias is not None:  # z + bias would have other bits than the base layer's
        y = call.base_output(x2)
    elif linear.dropout is None:
        y = scaled(u, gain, linear.bias)
    else:
        y = scaled(u, gain - 1, linear.bias, z)
    return y.view(*x.shape[:-1], y.shape[1]), xa, u, norm


def backward(dy: Tensor, kept: Kept, call: DoraCall, wanted: DoraWanted) -> DoraGradients:
    """Return dx, dA, dB, dbias and dmagnitude; see `reference`.

    Precision: as forward; dz = g ⊙ dy is rounded to dy's dtype, dmagnitude summed in g's.
    """
    linear, gain = call.linear, call.gain(kept.norm)
    dy2 = left_operand(dy)
    x2 = as_matrix(kept.x) if wanted.da and kept.x is not None else None
    dx = da = db = dm = None
    if has_wide_branch(dy, linear.adapter):
        dx, da, db = _wide_backward(dy2, x2, kept.xa, linear, gain, wanted)
    elif wanted.dx or wanted.da or wanted.db:
        dz, dropped = scaled(dy2, gain), wanted.dx and linear.dropout is not None
        asked = Wanted(wanted.dx and not dropped, wanted.da and not dropped, wanted.db, False)
        dx, da, db, _ = plain.backward(dz, x2, kept.xa, linear, asked)
        if dropped:
            dx, da = _dropped_backward(dy2, dz, x2, linear, gain)
    if wanted.dm and kept.u is not None:
        dm = torch.zeros_like(gain)
        for rows, _ in blocks(dy2.shape[0], dy2.shape[1], None):
            dm.add_((dy2[rows].to(gain.dtype) * kept.u[rows]).sum(0))
        dm = as_dtype(dm.div_(kept.norm), call.magnitude.dtype)
    return DoraGradients(
        dx.view(*dy.shape[:-1], dx.shape[1]) if dx is not None else None,
        as_dtype(da, linear.adapter.a.dtype) if da is not None else None,
        as_dtype(db, linear.adapter.b.dtype) if db is not None else None,
        dy2.sum(0) if wanted.dbias else None,
        dm,
    )


def _wide_forward(x: Tensor, call: LinearCall, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y of a float16 x beside wider adapters, and xa and u, which are float32.

    g ⊙ scaling · xa Bᵀ is formed as one product: (g - 1) of it would cancel where g is small.
    """
    (a, b, scaling), x2, weight = call.adapter, as_matrix(x), call.weight.decode()
    at, bt, wt = a.float().t(), b.float().t(), weight.float().t()
    y = x2.new_empty(x2.shape[0], weight.shape[0])
    xa, u = (x2.new_empty((len(x2), n), dtype=torch.float32) for n in (a.shape[0], y.shape[1]))
    for rows, keep in blocks(x2.shape[0], x2.shape[1], call.dropout):
        wide = x2[rows].float()
        kept = wide if keep is None else masked(wide, keep)
        if call.dropout is not None:
            kept = kept * call.dropout.scale
        torch.mm(kept, at, out=xa[rows])
        low = torch.mm(xa[rows] * scaling, bt)
        product = torch.mm(kept, wt)
        torch.add(product, low, out=u[rows])
        total = low.mul_(gain)
        if keep is None:
            total.addcmul_(product, gain)
        else:
            total.addcmul_(product, gain - 1).add_(torch.mm(wide, wt))
        y[rows] = total if call.bias is None else total.add_(call.bias)
    return y, xa, u


def _wide_backward(
    dy2: Tensor,
    x2: Tensor | None,
    xa: Tensor | None,
    call: LinearCall,
    gain: Tensor,
    wanted: DoraWanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx in dy's dtype, dA and dB in float32, all of float32 products."""
    (lora_A, lora_B, scaling), weight = call.adapter, call.weight.decode().float()
    a, b, dropout = lora_A.float(), lora_B.float(), call.dropout
    dx = dy2.new_empty(dy2.shape[0], weight.shape[1]) if wanted.dx else None
    da = torch.zeros_like(a) if x2 is not None else None
    db = torch.zeros_like(b) if wanted.db and xa is not None else None
    factor = 1.0 if dropout is None else dropout.scale
    for rows, keep in blocks(dy2.shape[0], a.shape[1], dropout):
        dy = dy2[rows].float()
        dz = dy * gain
        q = torch.mm(dz, b).mul_(scaling).mul_(factor)
        if dx is not None and keep is None:
            dx[rows] = torch.mm(dz, weight).addmm_(q, a)
        elif dx is not None and keep is not None:
            t = torch.mm((dz - dy) * factor, weight).addmm_(q, a)
            dx[rows] = torch.mm(dy, weight).add_(masked(t, keep, out=t))
        if da is not None and x2 is not None:
            kept = x2[rows] if keep is None else masked(x2[rows], keep)
            da.addmm_(q.t(), kept.float())
        if db is not None and xa is not None:
            db.addmm_(dz.t(), xa[rows].float())
    return dx, da, None if db is None else db.mul_(scaling)


def scaled(
    v: Tensor, gain: Tensor, bias: Tensor | None = None, base: Tensor | None = None
) -> Tensor:
    """Return gain ⊙ v + bias + base in v's dtype, rounded once."""
    if v.dtype == gain.dtype:
        out = v * gain
        for more in (base, bias):
            if more is not None:
                out.add_(more)
        return out
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for rows, _ in blocks(v.shape[0], v.shape[1], None):
        t = v[rows] * gain
        if base is not None:
            t.add_(base[rows])
        if bias is not None:
            t.add_(bias)
        out[rows].copy_(t)
    return out


def _dropped_product(x2: Tensor, xa: Tensor, call: LinearCall) -> Tensor:
    """Return u = D(x) Wᵀ + scaling · xa Bᵀ."""
    weight, dropout = call.weight.decode(), call.dropout
    assert dropout is not None
    u = x2.new_empty(x2.shape[0], weight.shape[0])
    for rows, keep in keep_blocks(x2.shape[0], x2.shape[1], dropout):
        to = u[rows]
        kept = masked(x2[rows], keep)
        torch.addmm(to, kept, weight.t(), beta=0, alpha=dropout.scale, out=to)
    plain.expand_(u, xa, call.adapter)
    return u


def _dropped_backward(
    dy2: Tensor, dz: Tensor, x2: Tensor | None, call: LinearCall, gain: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return dx = dy W + D((dz - dy) W + dxa A) and, where x is given, dA = dxaᵀ D(x)."""
    weight, dropout = call.weight.decode(), call.dropout
    assert dropout is not None
    # Of float16 the branch's products are float32, as in `linear`.
    half = dy2.dtype == torch.float16
    dtype = torch.float32 if half else dy2.dtype
    a, b = as_dtype(call.adapter.a, dtype), as_dtype(call.adapter.b, dtype)
    dx = base_gradient(dy2, weight)
    da = None if x2 is None else torch.zeros_like(a, dtype=gain.dtype)
    for rows, keep in keep_blocks(dy2.shape[0], a.shape[1], dropout):
        q = torch.mm(as_dtype(dz[rows], dtype), b).mul_(call.adapter.scaling).mul_(dropout.scale)
        t = torch.mm(scaled(dy2[rows], (gain - 1) * dropout.scale), weight)
        t = as_dtype(t, dtype).addmm_(q, a)
        dx[rows].add_(masked(t, keep, out=t))
        if x2 is not None and da is not None:
            da.add_(torch.mm(q.t(), as_dtype(masked(x2[rows], keep), dtype)))
    return dx, da

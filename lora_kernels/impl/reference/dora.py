"""The DoRA layer in plain torch: the definition of right.

Notation as in `linear`; ⊙ by columns of y, which are rows of W.

    forward    n  = ‖W + scaling · B A‖ of each row, a constant to autograd;  g = magnitude / n
               xa = D(x) Aᵀ
               u  = D(x) Wᵀ + scaling · xa Bᵀ
               y  = x Wᵀ + bias + scaling · xa Bᵀ + (g - 1) ⊙ u
    backward   dz = g ⊙ dy                              dxa = scaling · dz B
               dx = dy W + D((dz - dy) W + dxa A)
               dA = dxaᵀ D(x)
               dB = scaling · dzᵀ xa
               dbias = Σ_m dy
               dmagnitude = (Σ_m dy ⊙ u) / n

Without dropout y = g ⊙ u + bias and dx = dz W + dxa A: one product with W each way. D(x) goes
through W, too, as in the authors' code and PEFT's. n and g are float32, or float64 of float64.
"""

import torch
from torch import Tensor

from lora_kernels.impl.reference import linear as plain
from lora_kernels.impl.reference.linear import as_matrix, rounded
from lora_kernels.impl.reference.mask import dropped
from lora_kernels.operands.call import Adapter, LinearCall, Wanted
from lora_kernels.operands.dora import DoraCall, DoraGradients, DoraWanted, Kept
from lora_kernels.operands.precision import ranged
from lora_kernels.operands.weight import Dense


def row_norms(call: LinearCall) -> Tensor:
    """Return ‖W + scaling · B A‖ of each row, [N], of W, A and B as they are stored."""
    weight, (a, b, scaling) = call.weight.decode().detach(), call.adapter
    wide = torch.promote_types(weight.dtype, torch.float32)
    update = (b.detach().to(wide) @ a.detach().to(wide)) * scaling
    return torch.linalg.vector_norm(weight.to(wide) + update, dim=1)


def products(x: Tensor, call: LinearCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return z = x Wᵀ + scaling · xa Bᵀ and u, both [M, N], which are one without dropout; xa.

    z and u are of xa's dtype: beside wider adapters g brings them into the range of float16.
    """
    z, xa = plain.forward(as_matrix(x), call._replace(bias=None))
    if xa.dtype != x.dtype:
        own, kept, branch = _terms(x, xa, call)
        return own + branch, kept + branch, xa
    if call.dropout is None:
        return z, z, xa
    _, kept, branch = _terms(x, xa, call)
    return z, (kept + branch).to(x.dtype), xa


def _terms(x: Tensor, xa: Tensor, call: LinearCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return x Wᵀ, D(x) Wᵀ and scaling · xa Bᵀ, of float16 in float32."""
    b = rounded(call.adapter.b, x.dtype)
    x2, weight = as_matrix(x).to(b.dtype), call.weight.decode().to(b.dtype)
    branch = (xa.to(b.dtype) @ b.T) * call.adapter.scaling
    return x2 @ weight.T, dropped(x2, call.dropout) @ weight.T, branch


def forward(x: Tensor, call: DoraCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y [..., N], xa [M, R], u [M, N] of xa's dtype, which is as in `linear`, and n [N]."""
    linear = call.linear
    norm = row_norms(linear)
    gain = call.gain(norm)
    z, u, xa = products(x, linear)
    if xa.dtype != x.dtype:  # z and u may be large and cancel
        own, kept, branch = _terms(x, xa, linear)
        y = own + (gain - 1) * kept + gain * branch
    else:
        y = gain * z if linear.dropout is None else z + (gain - 1) * u
    if linear.bias is not None:
        y = y + linear.bias
    return y.to(x.dtype).reshape(*x.shape[:-1], z.shape[1]), xa, u, norm


def backward(dy: Tensor, kept: Kept, call: DoraCall, wanted: DoraWanted) -> DoraGradients:
    """Return the gradients of x, A, B, bias and magnitude, each None where not wanted.

    Args:
        dy: [..., N], the gradient of y.
        kept: of the forward call; x is needed for dA, xa for dB, u for dmagnitude only.
        call: as in forward; its bias is not read.
        wanted: which gradients are.

    Returns:
        dx and dbias in dy's dtype, the others in their parameters' dtypes.
    """
    (weight, adapter, _, dropout), gain = call.linear, call.gain(kept.norm)
    # Of float16 the range of what lies between is float32's, as in `linear`.
    wide = ranged(dy.dtype)
    a, b = rounded(adapter.a, dy.dtype), rounded(adapter.b, dy.dtype)
    w, dy2 = weight.decode().to(wide), as_matrix(dy).to(wide)
    dz = rounded(gain * dy2, dy.dtype)
    x, xa = (None if t is None else as_matrix(t).to(wide) for t in (kept.x, kept.xa))
    linear = LinearCall(Dense(w), Adapter(a, b, adapter.scaling), None, dropout)
    asked = Wanted(wanted.dx and dropout is None, wanted.da, wanted.db, False)
    dx, da, db, _ = plain.backward(dz, x, xa, linear, asked)
    if wanted.dx and dropout is not None:
        dxa = (dz @ b) * adapter.scaling
        dx = dy2 @ w + dropped(rounded((gain - 1) * dy2, dy.dtype) @ w + dxa @ a, dropout)
    dm = None
    if wanted.dm:
        assert kept.u is not None
        dm = ((dy2.to(gain.dtype) * kept.u).sum(0) / kept.norm).to(call.magnitude.dtype)
    return DoraGradients(
        None if dx is None else dx.to(dy.dtype).reshape(*dy.shape[:-1], w.shape[1]),
        None if da is None else da.to(adapter.a.dtype),
        None if db is None else db.to(adapter.b.dtype),
        dy2.sum(0).to(dy.dtype) if wanted.dbias else None,
        dm,
    )

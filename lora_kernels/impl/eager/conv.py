"""The adapted convolution: the library's products, B's added in place, masks drawn anew.

Same equations and signatures as `reference`. D(x) lives within a call; of float16 beside wider
adapters the branch is float32, and is added sample by sample.
"""

import torch
from torch import Tensor

from lora_kernels.impl.convolution import memory_format, rows_of, weight_gradient
from lora_kernels.impl.eager.conv_mask import kept, kept_both
from lora_kernels.impl.eager.conv_products import convolve, input_gradient
from lora_kernels.operands.call import Gradients, LinearCall, Wanted
from lora_kernels.operands.conv import Geometry, branch_dtype


def forward(x: Tensor, call: LinearCall, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return y and xa; see `reference`.

    xa has y's memory format. Precision: the library's products round to x's dtype, xa is rounded
    again after dropout's factor; the sum of both branches is rounded once more.
    """
    weight, dtype = call.weight.decode(), branch_dtype(x, call.adapter)
    a, b, scaling = call.adapter
    branch = x.to(dtype)
    dropped = branch if call.dropout is None else kept(branch, call.dropout)
    xa = convolve(dropped, a.to(dtype), None, geometry.of_a)
    if call.dropout is not None:
        xa.mul_(call.dropout.scale)
    y = convolve(x, weight, call.bias, geometry).contiguous(memory_format=memory_format(x, weight))
    _add(y, xa, b.to(dtype), scaling, geometry)
    return y, xa


def backward(
    dy: Tensor,
    inputs: tuple[Tensor | None, Tensor | None, list[int]],
    call: LinearCall,
    geometry: Geometry,
    wanted: Wanted,
) -> Gradients:
    """Return dx, dA, dB and dbias; see `reference`. Precision: as forward."""
    (x, xa, size), (lora_A, lora_B, scaling), dropout = inputs, call.adapter, call.dropout
    dtype = branch_dtype(dy, call.adapter)
    a, b, branch = lora_A.to(dtype), lora_B.to(dtype), dy.to(dtype)
    dx = da = db = None
    if wanted.dx:
        dx = input_gradient(size, call.weight.decode(), dy, geometry, x)
    if wanted.dx or wanted.da:
        between = [dy.shape[0], a.shape[0], *dy.shape[2:]]
        # With dropout's factor it serves both what follows: D(v) is keep · v · factor.
        dxa = input_gradient(between, b, branch, geometry.of_b, xa).mul_(scaling)
        if dropout is not None:
            dxa.mul_(dropout.scale)
        more = None if dx is None else input_gradient(size, a, dxa, geometry.of_a, x)
        dropped = x.to(dtype) if wanted.da and x is not None else None
        if dropout is not None:
            dropped, more = kept_both(dropped, more, dropout)
        if dx is not None and more is not None:
            dx.add_(more)
        if dropped is not None:
            da = weight_gradient(dropped, a, dxa, geometry.of_a).to(lora_A.dtype)
    if wanted.db and xa is not None:
        db = weight_gradient(xa, b, branch, geometry.of_b)
        db = db.to(torch.promote_types(db.dtype, torch.float32)).mul_(scaling).to(lora_B.dtype)
    dbias = dy.transpose(0, 1).flatten(1).sum(1) if wanted.dbias else None
    return Gradients(dx, da, db, dbias)


def _add(
    y: Tensor, xa: Tensor, lora_B: Tensor, scaling: float | Tensor, geometry: Geometry
) -> None:
    """Add scaling · conv(xa, B) to y in place; y is contiguous in one of torch's formats."""
    if geometry.groups > 1 or xa.dtype != y.dtype:
        for into, part in zip(y.split(1), xa.split(1), strict=True):
            into.add_(convolve(part, lora_B, None, geometry.of_b).mul_(scaling))
        return
    b, alpha = lora_B.flatten(1), 1.0
    if isinstance(scaling, Tensor):
        xa = xa * scaling
    else:
        alpha = scaling
    if y.is_contiguous():
        # Unlike view with -1, flatten takes an empty batch.
        y.flatten(2).baddbmm_(b.expand(y.shape[0], *b.shape), xa.flatten(2), alpha=alpha)
    else:
        y.movedim(1, -1).flatten(0, -2).addmm_(rows_of(xa), b.t(), alpha=alpha)

"""The adapted convolution in plain torch: the definition of right.

    forward    y  = conv(x, W) + bias + scaling · conv(xa, B)     xa  = conv(D(x), A)
    backward   dx = conv_input(dy, W) + D(conv_input(dxa, A))     dxa = scaling · conv_input(dy, B)
               dA = conv_weight(D(x), dxa)
               dB = scaling · conv_weight(xa, dy)
               dbias = Σ dy

A has W's kernel, stride and padding, B a kernel of 1 and W's groups. D's mask is that of the linear
layer on x with its channels last: element [n, c, ...] of x is element (m, c) of `mask.keep_mask`,
m the number of (n, ...) in x's logical order. So it doesn't depend on the memory format, and a
convolution of kernel 1 drops what the linear layer drops. float16's branch is as in `linear`.
"""

from torch import Tensor

from lora_kernels.impl.convolution import (
    convolve,
    from_rows,
    input_gradient,
    rows_of,
    weight_gradient,
)
from lora_kernels.impl.reference.linear import rounded
from lora_kernels.impl.reference.mask import dropped
from lora_kernels.operands.call import Gradients, LinearCall, Wanted
from lora_kernels.operands.conv import Geometry, branch_dtype
from lora_kernels.operands.dropout import Dropout


def forward(x: Tensor, call: LinearCall, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return y [N, out, ...] in x's dtype and xa [N, R, ...], of x [N, C, ...]."""
    adapter = call.adapter
    xa, b = shrunk(x, call, geometry), rounded(adapter.b, x.dtype)
    y = convolve(x, call.weight.decode(), call.bias, geometry)
    y = y + convolve(xa.to(b.dtype), b, None, geometry.of_b) * adapter.scaling
    return y.to(x.dtype), xa


def shrunk(x: Tensor, call: LinearCall, geometry: Geometry) -> Tensor:
    """Return xa."""
    a = rounded(call.adapter.a, x.dtype)
    xa = convolve(_dropped(x.to(a.dtype), call.dropout), a, None, geometry.of_a)
    dtype = branch_dtype(x, call.adapter)
    return rounded(xa, x.dtype) if dtype != x.dtype else xa.to(dtype)


def backward(
    dy: Tensor,
    inputs: tuple[Tensor | None, Tensor | None, list[int]],
    call: LinearCall,
    geometry: Geometry,
    wanted: Wanted,
) -> Gradients:
    """Return dx, dA, dB and dbias, each None where not wanted.

    Args:
        dy: [N, out, ...].
        inputs: x, needed for dA only; xa of the forward call, for dB only; x's shape.
        call, geometry: as in forward; the bias is not read.
        wanted: which gradients are.
    """
    (x, xa, size), (lora_A, lora_B, scaling) = inputs, call.adapter
    a, b = rounded(lora_A, dy.dtype), rounded(lora_B, dy.dtype)
    wide = dy.to(b.dtype)
    between = [dy.shape[0], a.shape[0], *dy.shape[2:]]
    dxa = rounded(input_gradient(between, b, wide, geometry.of_b) * scaling, dy.dtype)
    dx = da = db = None
    if wanted.dx:
        dx = input_gradient(size, call.weight.decode(), dy, geometry)
        branch = input_gradient(size, a, dxa, geometry.of_a)
        dx = (dx + _dropped(branch, call.dropout)).to(dy.dtype)
    if wanted.da:
        assert x is not None
        kept = _dropped(x.to(a.dtype), call.dropout)
        da = weight_gradient(kept, a, dxa, geometry.of_a).to(lora_A.dtype)
    if wanted.db:
        assert xa is not None
        db = weight_gradient(xa.to(b.dtype), b, wide, geometry.of_b) * scaling
        db = db.to(lora_B.dtype)
    dbias = dy.transpose(0, 1).flatten(1).sum(1) if wanted.dbias else None
    return Gradients(dx, da, db, dbias)


def _dropped(v: Tensor, dropout: Dropout | None) -> Tensor:
    return v if dropout is None else from_rows(dropped(rows_of(v), dropout), v)

"""The DoRA layer: from tensors to a plan and its launches. Signatures of `reference`."""

from functools import partial
from typing import Any

from torch import Tensor

from lora_kernels.impl.triton import dora_library, dora_one_launch
from lora_kernels.impl.triton.dora_passes import Norm
from lora_kernels.impl.triton.kinds import Kind, key_of, kind_of
from lora_kernels.impl.triton.launch import current
from lora_kernels.impl.triton.operands import (
    Operands,
    as_matrix,
    on_device,
    operands_of,
    unit_rows,
)
from lora_kernels.impl.triton.plan.config import LibraryConfig
from lora_kernels.operands.call import Wanted
from lora_kernels.operands.dora import DoraCall, DoraGradients, DoraWanted, Kept


def forward(x: Tensor, call: DoraCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y [..., N], xa [M, R], u [M, N] and n [N]; see `reference`.

    Precision: as `linear`'s; u and, with dropout, z are rounded to x's dtype, y is formed of them,
    g and bias in float32 and rounded once. n is formed in float32 of W, A and B as they are stored.
    """
    linear, magnitude = call.linear, call.magnitude.contiguous()
    bias = None if linear.bias is None else linear.bias.contiguous()
    rows, operands = unit_rows(as_matrix(x)), operands_of(linear, linear.weight.decode())
    y = x.new_empty(*x.shape[:-1], operands.sizes[0])
    with on_device(x):
        key = "dora", *key_of(rows, operands, None, bias, magnitude)
        if rows.shape[0] == 0:
            norm = current().prepared(("norm", *key), partial(_norm_launch, rows, operands))
            return y, x.new_empty(0, operands.sizes[2]), as_matrix(y), norm(operands)
        launches = current().prepared(key, partial(_forward_launches, rows, operands))
        return y, *launches(rows, operands, bias, magnitude, as_matrix(y))


def backward(dy: Tensor, kept: Kept, call: DoraCall, wanted: DoraWanted) -> DoraGradients:
    """Return dx, dA, dB, dbias and dmagnitude; see `reference`.

    Precision: as forward; dz = g ⊙ dy is rounded to dy's dtype, all sums are float32's, in an order
    that doesn't depend on timing. With dropout dx is rounded three times, of terms.
    """
    (weight, (lora_A, lora_B, _), _, _), magnitude = call.linear, call.magnitude.contiguous()
    operands, rows = operands_of(call.linear, weight.decode()), unit_rows(as_matrix(dy))
    x = unit_rows(as_matrix(kept.x)) if wanted.da and kept.x is not None else None
    u = unit_rows(kept.u) if wanted.dm and kept.u is not None else None
    n, k, r = operands.sizes
    dx = dy.new_empty(*dy.shape[:-1], k) if wanted.dx else None
    out = DoraGradients(
        None if dx is None else as_matrix(dx),
        lora_A.new_empty(r, k) if wanted.da else None,
        lora_B.new_empty(n, r) if wanted.db else None,
        dy.new_empty(n) if wanted.dbias else None,
        magnitude.new_empty(n) if wanted.dm else None,
    )
    if rows.shape[0] == 0:
        for t in out:
            if t is not None:
                t.zero_()
    elif any(wanted):
        norm = kept.norm.contiguous()
        with on_device(dy):
            key = "dora", *key_of(rows, operands, wanted, x, kept.xa, u, norm, magnitude)
            make = partial(_backward_launches, rows, operands, wanted)
            read = Kept(x, kept.xa, u, norm)
            current().prepared(key, make)(rows, read, operands, magnitude, out)
    return out if dx is out.dx else out._replace(dx=dx)


def _norm_launch(rows: Tensor, operands: Operands) -> Norm:
    return Norm(_kind(rows.new_empty(1, rows.shape[1]), operands, None))


def _forward_launches(rows: Tensor, operands: Operands) -> Any:
    kind = _kind(rows, operands, None)
    return _launches_of(kind).Forward(kind)


def _backward_launches(rows: Tensor, operands: Operands, wanted: DoraWanted) -> Any:
    # Products are formed of dz, which lies as it is allocated.
    products = Wanted(wanted.dx, wanted.da, wanted.db, False)
    kind = _kind(rows.new_empty(rows.shape), operands, products)
    return _launches_of(kind).Backward(kind)


def _kind(rows: Tensor, operands: Operands, wanted: Wanted | None) -> Kind:
    return kind_of(rows, operands, wanted, current(), gain=True)


def _launches_of(kind: Kind) -> Any:
    """Return the module that has the launches of a kind's plan."""
    library = isinstance(kind.plan.config, LibraryConfig)
    return dora_library if library else dora_one_launch

"""The grouped LoRA linear by ATen calls, group after group, which the host has to know.

Where torch has one kernel for all groups, `grouped_mm` serves instead.

Same equations and signatures as `reference`. Nothing is as large as the weights. A and B are copied
once a call where their groups don't lie one after the other: in PEFT's B experts are adjacent. Of
float16 the branch is float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_kernels.impl.eager import grouped_mm
from lora_kernels.impl.eager.mask import keep_rows, masked
from lora_kernels.impl.eager.products import as_dtype, left_operand
from lora_kernels.operands.call import Gradients, Wanted
from lora_kernels.operands.grouped import NO_ADAPTER, GroupedCall, Span
from lora_kernels.operands.precision import ranged

Masks = Iterator[tuple[slice, Tensor | None]]


def forward(x: Tensor, call: GroupedCall) -> tuple[Tensor, Tensor]:
    """Return y [S, N] and xa [S, R]; see `reference`.

    Precision: as `linear`'s; xa is rounded again after dropout's factor and after scaling, but for
    float16's, which is float32.
    """
    if grouped_mm.serves(x, call):
        return grouped_mm.forward(x, call)
    call.check_rows()
    spans, wide, scatter = call.spans(), ranged(x.dtype), call.groups.scatter
    a, b = _factor(call.adapter.a, wide), _factor(call.adapter.b, wide)
    # Who names rows of y need not name all.
    y = (x.new_empty if scatter is None else x.new_zeros)(call.sorted_rows, call.weight.shape[1])
    xa = x.new_empty(call.sorted_rows, a.shape[1], dtype=wide)
    for span in spans:
        some, g = slice(span.begin, span.end), span.adapter
        read = left_operand(_rows(x, call.groups.rows, span))
        bias = None if call.bias is None else call.bias[span.weight]
        out = _product(
            read, call.weight[span.weight].t(), bias, None if scatter is not None else y[some]
        )
        if g == NO_ADAPTER:
            xa[some].zero_()
        else:
            _shrink(read, a[g], _masks(call, span), call, xa[some])
            _add_product(out, xa[some] * call.scaling_of(g), b[g].t())
        if scatter is not None:
            y.index_copy_(0, scatter[some].long(), out)
    end = spans[-1].end if spans else 0
    xa[end:].zero_()
    if scatter is None:
        y[end:].zero_()
    return y, xa


def backward(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: GroupedCall, wanted: Wanted
) -> Gradients:
    """Return dx, dA, dB and dbias; see `reference`.

    Precision: as `linear`'s; sums over groups, dx's with `rows` among them, are float32.
    """
    if grouped_mm.serves(dy, call):
        return grouped_mm.backward(dy, x, xa, call, wanted)
    call.check_rows()
    (lora_A, lora_B, _), wide, spans = call.adapter, ranged(dy.dtype), call.spans()
    a, b, rows = _factor(lora_A, wide), _factor(lora_B, wide), call.groups.rows
    sums = torch.promote_types(dy.dtype, torch.float32)
    # Several groups read a row of x; of sorted rows each has one.
    dx = dy.new_zeros(call.tokens, call.weight.shape[2], dtype=dy.dtype if rows is None else sums)
    da, db = (dy.new_zeros(factor.shape, dtype=sums) for factor in (lora_A, lora_B))
    dbias = dy.new_zeros(call.weight.shape[:2], dtype=sums)
    for span in spans:
        some, g = slice(span.begin, span.end), span.adapter
        dy_rows = left_operand(_rows(dy, call.groups.scatter, span))
        into = None
        if wanted.dx:
            into = _product(
                dy_rows, call.weight[span.weight], None, dx[some] if rows is None else None
            )
        if wanted.dbias:
            dbias[span.weight].add_(dy_rows.sum(0))
        if g != NO_ADAPTER and (wanted.dx or wanted.da):
            dxa = torch.mm(as_dtype(dy_rows, wide), b[g]).mul_(call.scaling_of(g))
            read = _rows(x, rows, span) if wanted.da and x is not None else None
            part = _add_adapter(into, read, dxa, a[g], call, span)
            if part is not None:
                da[g].add_(part)
        if g != NO_ADAPTER and wanted.db and xa is not None:
            db[g].add_(torch.mm(as_dtype(dy_rows, wide).t(), xa[some] * call.scaling_of(g)))
        if into is not None and rows is not None:
            _add_rows(dx, rows[some].long(), into.to(sums))
    return Gradients(
        dx.to(dy.dtype) if wanted.dx else None,
        da.to(lora_A.dtype) if wanted.da else None,
        db.to(lora_B.dtype) if wanted.db else None,
        dbias.to(dy.dtype) if wanted.dbias else None,
    )


def _add_adapter(
    dx: Tensor | None, read: Tensor | None, dxa: Tensor, a: Tensor, call: GroupedCall, span: Span
) -> Tensor | None:
    """Add D(dxa A) to a group's dx in place and return dxaᵀ D(x), each where its tensor is."""
    factor = 1.0 if call.dropout is None else call.dropout.scale
    da = None if read is None else torch.zeros(a.shape, dtype=_sums(a), device=a.device)
    for some, keep in _masks(call, span):
        scaled = dxa[some] * factor if keep is not None else dxa[some]
        if dx is not None:
            if keep is None and dx.dtype == a.dtype:
                dx[some].addmm_(scaled, a)
            else:
                part = torch.mm(scaled, a)
                dx[some].add_(part if keep is None else masked(part, keep, out=part))
        if read is not None and da is not None:
            kept = read[some] if keep is None else masked(read[some], keep)
            da.add_(torch.mm(scaled.t(), as_dtype(kept, a.dtype)))
    return da


def _shrink(read: Tensor, a: Tensor, masks: Masks, call: GroupedCall, out: Tensor) -> None:
    """Write D(x) Aᵀ of a group's rows."""
    for some, keep in masks:
        kept = read[some] if keep is None else masked(read[some], keep)
        torch.mm(as_dtype(kept, a.dtype), a.t(), out=out[some])
    if call.dropout is not None:
        out.mul_(call.dropout.scale)


def _masks(call: GroupedCall, span: Span) -> Masks:
    """Yield slices of a group's rows with the keep masks of the rows of y that they have."""
    if call.dropout is None:
        yield slice(0, span.end - span.begin), None
        return
    scatter = call.groups.scatter
    if scatter is None:
        named = torch.arange(span.begin, span.end, device=call.weight.device)
    else:
        named = scatter[span.begin : span.end].long()
    yield from keep_rows(named, call.weight.shape[2], call.dropout)


def _sums(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return A or B of all groups, each a matrix as it lies."""
    return as_dtype(factor, dtype).contiguous()


def _rows(v: Tensor, named: Tensor | None, span: Span) -> Tensor:
    """Return the rows of a group: those that are named, else its own."""
    some = slice(span.begin, span.end)
    return v[some] if named is None else v.index_select(0, named[some])


def _product(v: Tensor, w: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """Return v w + bias, in `out` if there is one."""
    return torch.mm(v, w, out=out) if bias is None else torch.addmm(bias, v, w, out=out)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out.add_(torch.mm(left, right))


def _add_rows(total: Tensor, named: Tensor, part: Tensor) -> None:
    """Add rows to those that are named, in one order: index_add_ has one on CPUs alone."""
    if total.is_cpu:
        total.index_add_(0, named, part)
    else:
        total.index_put_((named,), part, accumulate=True)

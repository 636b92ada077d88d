"""The grouped LoRA linear in plain torch: the definition of right.

Notation: S sorted rows, of which a group has `begin` to `end`; T rows of x; N out_features, K
in_features, R rank. For a sorted row i of a group with weight w and adapter a::

    forward    y[to i] = x[from i] W[w]ᵀ + bias[w] + scaling[a] · xa[i] B[a]ᵀ
               xa[i] = D(x[from i]) A[a]ᵀ
    backward   dx[t] = Σ dy[to i] W[w] + D(dxa[i] A[a]) over the i with from i = t
               dxa[i] = scaling[a] · dy[to i] B[a]
               dA[a] = Σ dxa[i]ᵀ D(x[from i]),  dB[a] = scaling[a] · Σ dy[to i]ᵀ xa[i]
               dbias[w] = Σ dy[to i]

from i is rows[i], to i is scatter[i], i itself without them; the mask's row is to i. Rows after the
last group are zeros. float16 decides how numbers are rounded, not their range, as in `linear`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_kernels.impl.reference.linear import as_matrix, rounded
from lora_kernels.impl.reference.mask import dropped
from lora_kernels.operands.call import Gradients, Wanted
from lora_kernels.operands.grouped import NO_ADAPTER, GroupedCall, Span


def forward(x: Tensor, call: GroupedCall) -> tuple[Tensor, Tensor]:
    """Return y [S, N] in x's dtype, and xa [S, R] in it too, float32 beside float16."""
    call.check_rows()
    a, b = rounded(call.adapter.a, x.dtype), rounded(call.adapter.b, x.dtype)
    read, to = _read(x, call), _places(call)
    kept = dropped(read.to(a.dtype), call.dropout, to)
    outputs, shrunk = [], []
    for span, some in _spans(call):
        y = read[some] @ call.weight[span.weight].T
        xa = a.new_zeros(y.shape[0], a.shape[1])
        if span.adapter != NO_ADAPTER:
            xa = rounded(kept[some] @ a[span.adapter].T, x.dtype)
            y = y + (xa @ b[span.adapter].T) * call.scaling_of(span.adapter)
        if call.bias is not None:
            y = y + call.bias[span.weight]
        outputs.append(y.to(x.dtype))
        shrunk.append(xa)
    y = _filled(outputs, call.sorted_rows, x.new_zeros(0, call.weight.shape[1]))
    if call.groups.scatter is not None:
        y = torch.zeros_like(y).index_copy(0, to, y)
    return y, _filled(shrunk, call.sorted_rows, a.new_zeros(0, a.shape[1]))


def backward(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: GroupedCall, wanted: Wanted
) -> Gradients:
    """Return dx [T, K], dA, dB [G, ...] and dbias [G, N], each None where not wanted.

    Args:
        dy: [S, N], the gradient of y.
        x: [T, K], needed for dA only.
        xa: [S, R] of the forward call, needed for dB only.
        call: as in forward; its bias is not read.
        wanted: which gradients are.
    """
    call.check_rows()
    lora_A, lora_B, _ = call.adapter
    a, b = rounded(lora_A, dy.dtype), rounded(lora_B, dy.dtype)
    to = _places(call)
    dy = as_matrix(dy)[to]
    kept = None if x is None else dropped(_read(x, call).to(a.dtype), call.dropout, to)
    das, dbs = [torch.zeros_like(each) for each in a], [torch.zeros_like(each) for each in b]
    biases = [dy.new_zeros(dy.shape[1]) for _ in call.weight]
    inputs, branches = [], []
    for span, some in _spans(call):
        wide, g = dy[some].to(b.dtype), span.adapter
        inputs.append(dy[some] @ call.weight[span.weight])
        biases[span.weight] = biases[span.weight] + dy[some].sum(0)
        branch = a.new_zeros(inputs[-1].shape)
        if g != NO_ADAPTER:
            scaling = call.scaling_of(g)
            dxa = rounded((wide @ b[g]) * scaling, dy.dtype)
            branch = dxa @ a[g]
            if wanted.da and kept is not None:
                das[g] = das[g] + dxa.T @ kept[some]
            if wanted.db and xa is not None:
                dbs[g] = dbs[g] + (wide.T @ xa[some].to(b.dtype)) * scaling
        branches.append(branch)
    empty = dy.new_zeros(0, call.weight.shape[2])
    branch = _filled(branches, call.sorted_rows, empty.to(a.dtype))
    dx = _filled(inputs, call.sorted_rows, empty) + dropped(branch, call.dropout, to)
    return Gradients(
        _summed(dx, call).to(dy.dtype) if wanted.dx else None,
        torch.stack(das).to(lora_A.dtype) if wanted.da else None,
        torch.stack(dbs).to(lora_B.dtype) if wanted.db else None,
        torch.stack(biases) if wanted.dbias else None,
    )


def _spans(call: GroupedCall) -> Iterator[tuple[Span, slice]]:
    for span in call.spans():
        yield span, slice(span.begin, span.end)


def _read(x: Tensor, call: GroupedCall) -> Tensor:
    """Return the row of x that each sorted row reads."""
    rows = as_matrix(x)
    return rows if call.groups.rows is None else rows[call.groups.rows.long()]


def _places(call: GroupedCall) -> Tensor:
    """Return the row of y, and of the mask, that each sorted row has."""
    scatter = call.groups.scatter
    if scatter is not None:
        return scatter.long()
    return torch.arange(call.sorted_rows, device=call.weight.device)


def _filled(parts: list[Tensor], count: int, empty: Tensor) -> Tensor:
    """Return parts one below the other, and zeros up to so many rows."""
    found = torch.cat([empty, *parts])
    return torch.cat([found, found.new_zeros(count - found.shape[0], found.shape[1])])


def _summed(dx: Tensor, call: GroupedCall) -> Tensor:
    """Return the sum of the sorted rows' gradients over each row of x."""
    rows = call.groups.rows
    if rows is None:
        return dx
    total = dx.new_zeros(
        call.tokens, dx.shape[1], dtype=torch.promote_types(dx.dtype, torch.float32)
    )
    return total.index_add(0, rows.long(), dx.to(total.dtype))

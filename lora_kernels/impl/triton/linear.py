"""The adapted linear layer: from tensors to a plan and its launches. Signatures of `reference`."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_kernels.impl.triton import library, one_launch
from lora_kernels.impl.triton.decode import as_stored, in_memory, read
from lora_kernels.impl.triton.kinds import Kind, key_of, kind_of
from lora_kernels.impl.triton.launch import current
from lora_kernels.impl.triton.operands import Operands, as_matrix, unit_rows
from lora_kernels.impl.triton.plan.config import LibraryConfig, problem_of
from lora_kernels.impl.triton.plan.plan import Plan
from lora_kernels.operands.call import Gradients, LinearCall, Wanted
from lora_kernels.operands.weight import QuantizedWeight

_HERE = nullcontext()


def forward(x: Tensor, call: LinearCall) -> tuple[Tensor, Tensor]:
    """Return y [..., N] and xa [M, R]; see `reference`.

    Precision: products accumulate in float32 (IEEE, or TF32 for float32 inputs where torch's
    switch allows it); A, B and scaling · B are rounded to x's dtype on load (of float16, whose sums
    are scaled instead, A and B), xa and y once. By the library plan y is rounded twice, first
    without x Wᵀ. Parts of xa that one column of tiles leaves to the next are rounded to 12
    significant bits (bfloat16; 16 for float16, none for float32), four to five more than xa keeps.
    """
    rows, weight = unit_rows(as_matrix(x)), as_stored(call.weight)
    m, n, r = rows.shape[0], weight.shape[0], call.adapter.a.shape[0]
    y = x.new_empty(*x.shape[:-1], n)
    if m == 0:
        return y, x.new_empty(m, r)
    if r == 0:
        with on_device(x):
            _base_product(as_matrix(y), rows, in_memory(call.weight, x.dtype).t(), call.bias)
        return y, x.new_empty(m, r)
    planned = _planned(rows, call, None)
    with on_device(x):
        operands = read(call, rows, planned)
        key = key_of(rows, operands, None, call.bias)
        make = partial(_forward_launches, rows, operands, planned)
        return y, current().prepared(key, make)(rows, operands, call.bias, as_matrix(y))


def backward(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: LinearCall, wanted: Wanted
) -> Gradients:
    """Return dx, dA, dB, dbias; see `reference`.

    Precision: all sums in float32, in an order that doesn't depend on timing; dxa is rounded once
    to dy's dtype (float16: in a unit of its row panel, so that nothing vanishes or overflows),
    results once to their parameters' dtypes. By the library plan dx is rounded twice, first without
    dy W.
    """
    weight, (lora_A, lora_B, _) = as_stored(call.weight), call.adapter
    rows = unit_rows(as_matrix(dy))
    x2 = unit_rows(as_matrix(x)) if wanted.da and x is not None else None
    m, (n, k), r = rows.shape[0], weight.shape, lora_A.shape[0]
    dx = dy.new_empty(*dy.shape[:-1], k) if wanted.dx else None
    out = Gradients(
        None if dx is None else as_matrix(dx),
        lora_A.new_empty(r, k) if wanted.da else None,
        lora_B.new_empty(n, r) if wanted.db else None,
        dy.new_empty(n) if wanted.dbias else None,
    )
    if m == 0:
        for t in out:
            if t is not None:
                t.zero_()
    elif r == 0:
        if out.dx is not None:
            with on_device(dy):
                _base_product(out.dx, rows, in_memory(call.weight, dy.dtype))
        if out.dbias is not None:
            torch.sum(rows, 0, out=out.dbias)
    elif any(wanted):
        planned = _planned(rows, call, wanted)
        with on_device(dy):
            operands = read(call, rows, planned, product=wanted.dx)
            key = key_of(rows, operands, wanted, x2, xa)
            make = partial(_backward_launches, rows, operands, wanted, planned)
            current().prepared(key, make)(rows, x2, xa, operands, out)
    return out if dx is out.dx else out._replace(dx=dx)


def _planned(rows: Tensor, call: LinearCall, wanted: Wanted | None) -> Plan | None:
    """Return the plan of a quantised W, which says how it is read; None of a dense one."""
    if not isinstance(call.weight, QuantizedWeight):
        return None
    dropout, executor = call.dropout is not None, current()
    problem = problem_of(rows, call.weight, call.adapter.a, dropout, wanted)
    return executor.plan(problem, executor.device(rows))


def _forward_launches(
    x: Tensor, operands: Operands, planned: Plan | None
) -> one_launch.Forward | library.Forward:
    kind = kind_of(x, operands, None, current(), planned)
    return _launches_of(kind).Forward(kind)


def _backward_launches(
    dy: Tensor, operands: Operands, wanted: Wanted, planned: Plan | None
) -> one_launch.Backward | library.Backward:
    kind = kind_of(dy, operands, wanted, current(), planned)
    return _launches_of(kind).Backward(kind)


def _launches_of(kind: Kind) -> Any:
    """Return the module that has the launches of a kind's plan."""
    return library if isinstance(kind.plan.config, LibraryConfig) else one_launch


def _base_product(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    """Store left right + bias: a layer's whole result where a quantised W has no adapter."""
    if bias is None:
        out.zero_()
    else:
        out.copy_(bias)
    current().add_product(out, left, right)


def on_device(t: Tensor) -> Any:
    """Make the tensor's GPU the current one: Triton launches there."""
    if t.device.type != "cuda" or t.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(t.device)

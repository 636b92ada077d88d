"""The adapted linear layer: from tensors to a plan and its launches. Signatures of `reference`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_kernels.impl.triton import library, one_launch
from lora_kernels.impl.triton.decode import Decoding, Read, as_it_lies, parts_of, reading, stored
from lora_kernels.impl.triton.kinds import key_of, kind_of
from lora_kernels.impl.triton.launch import current
from lora_kernels.impl.triton.operands import Operands, as_matrix, on_device, unit_rows
from lora_kernels.impl.triton.plan.config import LibraryConfig
from lora_kernels.operands.call import Gradients, LinearCall, Wanted
from lora_kernels.operands.weight import QuantizedWeight, Weight


def forward(x: Tensor, call: LinearCall) -> tuple[Tensor, Tensor]:
    """Return y [..., N] and xa [M, R]; see `reference`.

    Precision: products accumulate in float32 (IEEE, or TF32 for float32 inputs where torch's
    switch allows it); A, B and scaling · B are rounded to x's dtype on load (of float16, whose sums
    are scaled instead, A and B), xa and y once. By the library plan y is rounded twice, first
    without x Wᵀ. Parts of xa that one column of tiles leaves to the next are rounded to 12
    significant bits (bfloat16; 16 for float16, none for float32), four to five more than xa keeps.
    """
    rows, weight = unit_rows(as_matrix(x)), call.weight
    m, n, r = rows.shape[0], weight.shape[0], call.adapter.a.shape[0]
    y = x.new_empty(*x.shape[:-1], n)
    if m == 0:
        return y, x.new_empty(m, r)
    if r == 0:
        with on_device(x):
            _base_product(as_matrix(y), rows, _in_memory(rows, call).t(), call.bias)
        return y, x.new_empty(m, r)
    with on_device(x):
        operands = stored(call)
        key = key_of(rows, operands, None, call.bias, *parts_of(weight))
        read, launches = current().prepared(key, partial(_made, rows, operands, weight, None))
        return y, launches(rows, read(operands, weight), call.bias, as_matrix(y))


def backward(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: LinearCall, wanted: Wanted
) -> Gradients:
    """Return dx, dA, dB, dbias; see `reference`.

    Precision: all sums in float32, in an order that doesn't depend on timing; dxa is rounded once
    to dy's dtype (float16: in a unit of its row panel, so that nothing vanishes or overflows),
    results once to their parameters' dtypes. By the library plan dx is rounded twice, first without
    dy W.
    """
    weight, (lora_A, lora_B, _) = call.weight, call.adapter
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
                _base_product(out.dx, rows, _in_memory(rows, call))
        if out.dbias is not None:
            torch.sum(rows, 0, out=out.dbias)
    elif any(wanted):
        with on_device(dy):
            operands = stored(call)
            key = key_of(rows, operands, wanted, x2, xa, *parts_of(weight))
            make = partial(_made, rows, operands, weight, wanted)
            read, launches = current().prepared(key, make)
            launches(rows, x2, xa, read(operands, weight), out)
    return out if dx is out.dx else out._replace(dx=dx)


def _made(
    rows: Tensor, operands: Operands, weight: Weight, wanted: Wanted | None
) -> tuple[Read, Any]:
    """Return how calls of a kind read W, and the launches of their products."""
    executor, planned = current(), None
    read: Read = as_it_lies
    if isinstance(weight, QuantizedWeight):
        read, operands, planned = reading(rows, operands, weight, wanted, executor)
    kind = kind_of(rows, operands, wanted, executor, planned)
    module: Any = library if isinstance(kind.plan.config, LibraryConfig) else one_launch
    return read, module.Forward(kind) if wanted is None else module.Backward(kind)


def _in_memory(rows: Tensor, call: LinearCall) -> Tensor:
    """Return W as it lies, or decoded to the dtype of x or dy."""
    weight, executor = call.weight, current()
    if not isinstance(weight, QuantizedWeight):
        return weight.decode()
    key = key_of(rows, stored(call), None, *weight.parts)
    return executor.prepared(key, partial(Decoding, weight, rows.dtype, executor))(weight)


def _base_product(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    """Store left right + bias: a layer's whole result where a quantised W has no adapter."""
    if bias is None:
        out.zero_()
    else:
        out.copy_(bias)
    current().add_product(out, left, right)

"""The adapted linear layer: from tensors to a plan and its launches. Signatures of `reference`."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lora_kernels.impl.triton import library, one_launch
from lora_kernels.impl.triton.launch import current
from lora_kernels.impl.triton.operands import as_matrix, operands_of, unit_rows
from lora_kernels.impl.triton.plan.config import LibraryConfig, problem_of
from lora_kernels.operands.call import Gradients, LinearCall, Wanted


def forward(x: Tensor, call: LinearCall) -> tuple[Tensor, Tensor]:
    """Return y [..., N] and xa [M, R]; see `reference`.

    Precision: products accumulate in float32 (IEEE, or TF32 for float32 inputs where torch's
    switch allows it); A, B and scaling · B are rounded to x's dtype on load (of float16, whose sums
    are scaled instead, A and B), xa and y once. By the library plan y is rounded twice, first
    without x Wᵀ. Parts of xa that one column of tiles leaves to the next are rounded to 12
    significant bits (bfloat16; 16 for float16, none for float32), four to five more than xa keeps.
    """
    operands = operands_of(call)
    rows = unit_rows(as_matrix(x))
    m, (n, _, r) = rows.shape[0], operands.sizes
    y = x.new_empty(*x.shape[:-1], n)
    if m == 0:
        return y, x.new_empty(m, r)
    problem = problem_of(rows, operands.weight, operands.a, call.dropout is not None)
    executor = current()
    chosen = executor.plan(problem, executor.device(x))
    made = library if isinstance(chosen.config, LibraryConfig) else one_launch
    with _on_device(x):
        return y, made.forward(rows, operands, call.bias, y.view(m, n), chosen)


def backward(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: LinearCall, wanted: Wanted
) -> Gradients:
    """Return dx, dA, dB, dbias; see `reference`.

    Precision: all sums in float32, in an order that doesn't depend on timing; dxa is rounded once
    to dy's dtype (float16: in a unit of its row panel, so that nothing vanishes or overflows),
    results once to their parameters' dtypes. By the library plan dx is rounded twice, first without
    dy W.
    """
    operands, (lora_A, lora_B, _) = operands_of(call), call.adapter
    rows = unit_rows(as_matrix(dy))
    x2 = unit_rows(as_matrix(x)) if wanted.da and x is not None else None
    m, (n, k, r) = rows.shape[0], operands.sizes
    dx = dy.new_empty(*dy.shape[:-1], k) if wanted.dx else None
    out = Gradients(
        dx if dx is None else dx.view(m, k),
        lora_A.new_empty(r, k) if wanted.da else None,
        lora_B.new_empty(n, r) if wanted.db else None,
        dy.new_empty(n) if wanted.dbias else None,
    )
    if m == 0:
        for t in out:
            if t is not None:
                t.zero_()
    elif any(wanted):
        problem = problem_of(rows, operands.weight, operands.a, call.dropout is not None, wanted)
        executor = current()
        chosen = executor.plan(problem, executor.device(dy))
        made = library if isinstance(chosen.config, LibraryConfig) else one_launch
        with _on_device(dy):
            made.backward(rows, x2, xa, operands, out, chosen)
    return out._replace(dx=dx)


def _on_device(t: Tensor) -> Any:
    """Make the tensor's GPU the current one: Triton launches there."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else nullcontext()

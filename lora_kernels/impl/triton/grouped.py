"""The grouped LoRA linear: from tensors to its launches. Signatures of `reference`.

One kernel each way, which finds out by itself how many rows a group has: the host doesn't wait for
the GPU. Beside it backward copies a B whose ranks lie apart, and adds the rows of dx that `rows`
names more than once. Not run on a GPU.
"""

from functools import partial
from typing import Any

from torch import Tensor

from lora_kernels.impl.triton.grouped_launches import (
    Backward,
    Forward,
    GroupedOperands,
    operands_of,
)
from lora_kernels.impl.triton.kinds import lie
from lora_kernels.impl.triton.launch import current
from lora_kernels.impl.triton.operands import on_device, unit_rows
from lora_kernels.operands.call import Gradients, Wanted
from lora_kernels.operands.grouped import GroupedCall
from lora_kernels.operands.precision import ranged


def forward(x: Tensor, call: GroupedCall) -> tuple[Tensor, Tensor]:
    """Return y [S, N] in x's dtype, and xa [S, R] in it too, float32 beside float16.

    Precision: as `linear`'s; of float16 the adapter's second products are TF32's, which has
    float16's precision and float32's range.
    """
    call.check_rows()
    count, n, r = call.sorted_rows, call.weight.shape[1], call.adapter.a.shape[1]
    y = x.new_empty(count, n)
    xa = x.new_empty(count, r, dtype=ranged(x.dtype))
    if not call.groups.offsets.shape[0]:
        return y.zero_(), xa.zero_()
    if count and n:
        with on_device(x):
            rows, operands = unit_rows(x), operands_of(call)
            key = _key(rows, operands, None)
            launches = current().prepared(key, partial(Forward, rows, operands, current()))
            launches(rows, operands, y, xa)
    return y, xa


def backward(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: GroupedCall, wanted: Wanted
) -> Gradients:
    """Return dx, dA, dB and dbias; see `reference`.

    Precision: all sums in float32, in an order that offsets and rows alone decide; dxa is rounded
    once to dy's precision, results once to their parameters' dtypes.
    """
    call.check_rows()
    (lora_A, lora_B, _), (weights, n, k) = call.adapter, call.weight.shape
    count = call.sorted_rows
    out = Gradients(
        dy.new_empty(count, k) if wanted.dx else None,
        lora_A.new_empty(lora_A.shape) if wanted.da and x is not None else None,
        lora_B.new_empty(lora_B.shape) if wanted.db and xa is not None else None,
        dy.new_empty(weights, n) if wanted.dbias else None,
    )
    if not (count and n and k and call.groups.offsets.shape[0]):
        for t in out:
            if t is not None:
                t.zero_()
    elif any(t is not None for t in out):
        wanted = Wanted(*(t is not None for t in out))
        with on_device(dy):
            rows, operands = unit_rows(dy), operands_of(call, dy.dtype)
            x = unit_rows(x) if wanted.da and x is not None else None
            xa = xa.contiguous() if wanted.db and xa is not None else None
            make = partial(Backward, rows, operands, current(), wanted)
            key = _key(rows, operands, wanted, x, xa)
            current().prepared(key, make)(rows, x, xa, operands, out)
    if out.dx is None or call.groups.rows is None:
        return out
    return out._replace(dx=call.summed(out.dx))


def _key(rows: Tensor, operands: GroupedOperands, wanted: Any, *others: Tensor | None) -> Any:
    """Return all that a kind's tiles and compiled kernels depend on, as `kinds.key_of`."""
    return (
        "grouped", rows.device, (operands.sorted_rows - 1).bit_length(), wanted, operands.numbers,
        operands.weight.shape, operands.a.shape, operands.groups.offsets.shape, lie(rows),
        *map(lie, operands.tensors), *map(lie, others),
    )  # fmt: skip

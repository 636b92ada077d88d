"""The adapted embedding in few, in-place ATen calls.

Same equations and signatures as `reference`. A's columns are gathered before they are rounded, the
branch is added to W[ids] in place, in y's dtype, so that beside float32 adapters there is no
[M, H] tensor in float32. By blocks of rows in float32 it is where float16 would lose its range, and
where a CPU has no products in bfloat16.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding

from lora_kernels.operands.call import Gradients, Wanted
from lora_kernels.operands.embedding import NO_PADDING, EmbeddingCall

BLOCK_ELEMENTS = 1 << 21  # of rows in float32 (8 MB)


def forward(ids: Tensor, call: EmbeddingCall) -> Tensor:
    """Return y [..., H]; see `reference`."""
    assert call.weight is not None
    weight, (a, b, _), factor = call.weight.decode(), call.adapter, call.factor
    y, rows = embedding(ids, weight), ids.reshape(-1)
    if call.embed_scale is not None:
        y.mul_(call.embed_scale.to(y.dtype))
    y2, xa = y.view(rows.shape[0], y.shape[-1]), a.index_select(1, rows).t()
    if _by_float32(y):
        for some in _blocks(y2):
            y2[some].add_(torch.mm(xa[some].float() * factor, b.float().t()))
    elif isinstance(factor, Tensor):
        y2.addmm_((xa * factor).to(y.dtype), b.to(y.dtype).t())
    else:
        y2.addmm_(xa.to(y.dtype), b.to(y.dtype).t(), alpha=factor)
    return y


def backward(dy: Tensor, ids: Tensor, call: EmbeddingCall, wanted: Wanted) -> Gradients:
    """Return dA and dB; see `reference`.

    Precision: dy B is rounded to dy's dtype, but for blocks in float32; dA's sums are float32
    (float64 for float64), formed in an order that depends on ids alone.
    """
    (a, b, _), factor, rows = call.adapter, call.factor, ids.reshape(-1)
    # A copy where rows lie apart or are one: see `reference.linear`.
    dy2 = dy.reshape(rows.shape[0], dy.shape[-1]).contiguous()
    wide = torch.promote_types(dy.dtype, torch.float32)
    da = db = None
    if wanted.da:
        if _by_float32(dy):
            dxa = torch.empty(rows.shape[0], b.shape[1], dtype=wide, device=dy.device)
            for some in _blocks(dy2):
                torch.mm(dy2[some].float(), b.float(), out=dxa[some])
        else:
            dxa = torch.mm(dy2, b.to(dy.dtype)).to(wide)
        da = _summed_by_id(dxa.mul_(factor), rows, a.shape[1], call.padding_idx).to(a.dtype)
    if wanted.db:
        xa = a.index_select(1, rows)
        if _by_float32(dy):
            db = torch.zeros(b.shape, dtype=wide, device=b.device)
            for some in _blocks(dy2):
                db.addmm_(dy2[some].float().t(), xa[:, some].float().t())
        else:
            db = torch.mm(dy2.t(), xa.to(dy.dtype).t()).to(wide)
        db = db.mul_(factor).to(b.dtype)
    return Gradients(None, da, db, None)


def _summed_by_id(dxa: Tensor, rows: Tensor, count: int, padding_idx: int) -> Tensor:
    """Return [R, count]: the sums of the rows of dxa that have one id, none for padding_idx.

    On GPUs index_add_ adds by atomics, in any order; the embedding's own backward sorts ids first.
    On CPUs that one looks through all ids for each row of the table, and index_add_ has one order.
    """
    if not dxa.is_cpu:
        by_row = torch.ops.aten.embedding_dense_backward(dxa, rows, count, padding_idx, False)
        return by_row.t()
    # 2026-11-29, Zen 3, 2,048 ids, 128,256 rows, rank 16: 2.0 ms, 16.8 by rows of [count, R].
    total = dxa.new_zeros(dxa.shape[1], count).index_add_(1, rows, dxa.t())
    if padding_idx != NO_PADDING:
        total[:, padding_idx].zero_()
    return total


def _by_float32(v: Tensor) -> bool:
    return v.dtype == torch.float16 or (
        v.dtype == torch.bfloat16 and v.is_cpu and not _has_bfloat16_products()
    )


@cache
def _has_bfloat16_products() -> bool:
    """Whether oneDNN multiplies in bfloat16 here; torch's own loop takes 10 times as long."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, rows.shape[1]))
    for first in range(0, rows.shape[0], step):
        yield slice(first, min(first + step, rows.shape[0]))

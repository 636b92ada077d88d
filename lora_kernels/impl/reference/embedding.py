"""The adapted embedding in plain torch: the definition of right.

Notation: M ids, V rows of the table, H its columns, R rank.

    forward    y  = (W[ids] + scaling · xa Bᵀ) · embed_scale      xa  = Aᵀ[ids]
    backward   dA[:, v] = Σ dxa[m] over the m with ids[m] = v     dxa = scaling · embed_scale · dy B
               dA[:, padding_idx] = 0
               dB = scaling · embed_scale · dyᵀ xa

PEFT's embedding drops nothing, whatever its lora_dropout. float16 decides how numbers are rounded,
not their range, as in `linear`.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding

from lora_kernels.impl.reference.linear import rounded
from lora_kernels.operands.call import Gradients, Wanted
from lora_kernels.operands.embedding import NO_PADDING, EmbeddingCall


def forward(ids: Tensor, call: EmbeddingCall) -> Tensor:
    """Return y [..., H], in W's dtype, of ids [...], int32 or int64."""
    assert call.weight is not None
    weight = call.weight.decode()
    padding_idx = None if call.padding_idx == NO_PADDING else call.padding_idx
    a, b = rounded(call.adapter.a, weight.dtype), rounded(call.adapter.b, weight.dtype)
    y = embedding(ids, weight, padding_idx)
    if call.embed_scale is not None:
        y = y * call.embed_scale.to(y.dtype)
    xa = embedding(ids, a.T, padding_idx)
    return (y + (xa @ b.T) * call.factor).to(weight.dtype)


def backward(dy: Tensor, ids: Tensor, call: EmbeddingCall, wanted: Wanted) -> Gradients:
    """Return dA [R, V] and dB [H, R], each None where not wanted, in their parameters' dtypes.

    Args:
        dy: [..., H], the gradient of y.
        ids: [...].
        call: as in forward; its weight is not read.
        wanted: of da and db.
    """
    lora_A, lora_B, _ = call.adapter
    a, b = rounded(lora_A, dy.dtype), rounded(lora_B, dy.dtype)
    dy2, rows = dy.reshape(-1, dy.shape[-1]).to(b.dtype), ids.reshape(-1)
    da = db = None
    if wanted.da:
        dxa = rounded((dy2 @ b) * call.factor, dy.dtype)
        wide = dxa.to(torch.promote_types(dxa.dtype, torch.float32))
        da = torch.ops.aten.embedding_dense_backward(
            wide, rows, lora_A.shape[1], call.padding_idx, False
        )
        da = da.T.to(lora_A.dtype)
    if wanted.db:
        padding_idx = None if call.padding_idx == NO_PADDING else call.padding_idx
        db = ((dy2.T @ embedding(rows, a.T, padding_idx)) * call.factor).to(lora_B.dtype)
    return Gradients(None, da, db, None)

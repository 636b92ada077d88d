"""A mixed batch in plain torch, as the grouped layer whose groups are its adapters' rows.

For a row m whose sample has the owner o::

    forward    y[m] = x[m] Wᵀ + bias + scalings[o] · xa[m] B[o]ᵀ,  xa[m] = D(x[m]) A[o]ᵀ
    backward   dx[m] = dy[m] W + D(dxa[m] A[o]),  dxa[m] = scalings[o] · dy[m] B[o]
               dA[o] = Σ dxa[m]ᵀ D(x[m]),  dB[o] = scalings[o] · Σ dy[m]ᵀ xa[m],  dbias = Σ dy[m]

A row without an owner has the layer's own product alone. xa has the columns of the largest rank.
"""

import torch
from torch import Tensor

from lora_kernels.impl.reference import grouped
from lora_kernels.operands.call import Wanted
from lora_kernels.operands.mixed import MixedCall, MixedGradients


def forward(x: Tensor, call: MixedCall) -> tuple[Tensor, Tensor]:
    """Return y [M, N] in x's dtype, and xa [M, R] in it too, float32 beside float16."""
    sorted_call, order = call.as_grouped(len(x))
    y, xa = grouped.forward(x, sorted_call)
    return y, torch.zeros_like(xa).index_copy(0, order, xa)


def backward(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: MixedCall, wanted: Wanted
) -> MixedGradients:
    """Return dx [M, K], the adapters' dA and dB, none where not wanted, and dbias [N]."""
    sorted_call, order = call.as_grouped(len(dy))
    xa = None if xa is None else xa[order]
    return call.gradients(grouped.backward(dy, x, xa, sorted_call, wanted))

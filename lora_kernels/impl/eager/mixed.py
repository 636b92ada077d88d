"""A mixed batch by ATen calls, as the grouped layer whose groups are its adapters' rows.

Same equations and signatures as `reference`. All adapters' factors are copied once a call.
"""

import torch
from torch import Tensor

from lora_kernels.impl.eager import grouped
from lora_kernels.operands.call import Wanted
from lora_kernels.operands.mixed import MixedCall, MixedGradients


def forward(x: Tensor, call: MixedCall) -> tuple[Tensor, Tensor]:
    """Return y [M, N] and xa [M, R]; see `reference`.

    Precision: as `grouped`'s.
    """
    sorted_call, order = call.as_grouped(len(x))
    y, xa = grouped.forward(x, sorted_call)
    return y, torch.empty_like(xa).index_copy_(0, order, xa)


def backward(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: MixedCall, wanted: Wanted
) -> MixedGradients:
    """Return dx, the adapters' dA and dB, and dbias; see `reference`.

    Precision: as `grouped`'s.
    """
    sorted_call, order = call.as_grouped(len(dy))
    xa = None if xa is None else xa.index_select(0, order)
    return call.gradients(grouped.backward(dy, x, xa, sorted_call, wanted))

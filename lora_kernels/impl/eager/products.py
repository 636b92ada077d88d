"""Blocks of rows and products with W, which the eager ops share."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels.impl.eager import onednn
from lora_kernels.impl.eager.mask import keep_blocks
from lora_kernels.operands.call import LinearCall
from lora_kernels.operands.dropout import Dropout

BLOCK_ELEMENTS = 1 << 21  # of rows in float32 (8 MB), where no mask is drawn


def blocks(
    rows: int, columns: int, dropout: Dropout | None
) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield slices of rows, from top to bottom, with their keep masks if any are dropped."""
    if dropout is not None:
        yield from keep_blocks(rows, columns, dropout)
        return
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows)), None


def as_matrix(v: Tensor) -> Tensor:
    """Return v [..., C] as [M, C]; v itself where it is one, since a view costs 1 µs."""
    return v if v.ndim == 2 else v.reshape(-1, v.shape[-1])


def left_operand(v: Tensor) -> Tensor:
    """Return v as [M, C], copied where torch would read beyond its rows; see `reference`.

    It takes 32 columns at a time.
    """
    v = as_matrix(v)
    apart = v.stride(0) != v.shape[1]
    if apart and v.shape[1] % 32 and v.dtype == torch.bfloat16 and v.device.type == "cpu":
        return v.contiguous()
    return v


def as_dtype(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v if v.dtype == dtype else v.to(dtype)


def base_linear(x: Tensor, call: LinearCall) -> Tensor:
    """Return x Wᵀ + bias."""
    weight = call.weight.decode(x.dtype)
    product = onednn.linear if onednn.preferred(x, weight) else linear
    return product(x, weight, call.bias)


def base_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """Return dy W."""
    if onednn.preferred(dy, weight.t()):
        return onednn.linear(dy, weight.t(), None)
    return torch.mm(dy, weight)

"""The mask of a call, by itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.checks import check_dropout_p, check_seed
from lora_kernels.impl.reference.mask import keep_mask
from lora_kernels.operands.dropout import drop_threshold


def dropout_mask(
    shape: Sequence[int],
    dropout_p: float,
    seed: int | Tensor,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the keep mask that a `lora_linear` call with this seed uses::

        D(x) = x · mask · 65536 / (65536 - t),  t = min(round(65536 p), 65535)

    Args:
        shape: shape of x, [..., K]; at least one dimension.
        dropout_p: probability in [0, 1).
        seed: the call's seed, a signed 64-bit int or a 0-dim int64 tensor on `device`.
        device: where the mask is made; its values don't depend on it.

    Returns:
        bool tensor of `shape`, True where the element is kept.

    Raises:
        TypeError, ValueError: an argument outside what is said above.

    Source: Philox-4x32-10 of Salmon et al., Parallel random numbers, SC'11; how elements map to its
    lanes is said in `impl/reference/mask.py`.

    Example:
        >>> lk.dropout_mask((1, 6), 0.5, seed=7)
        tensor([[False,  True,  True,  True,  True, False]])
        >>> x, a, b = torch.ones(1, 6), torch.ones(1, 6), torch.ones(1, 1)
        >>> lk.lora_linear(x, torch.zeros(1, 6), a, b, dropout_p=0.5, training=True, seed=7)
        tensor([[8.]])
    """
    dims = tuple(shape) if isinstance(shape, Sequence) else ()
    if not dims or any(isinstance(d, bool) or not isinstance(d, int) or d < 0 for d in dims):
        raise ValueError(f"shape: expected at least one non-negative int, got {shape!r}")
    check_dropout_p(dropout_p)
    if seed is None:
        raise TypeError("seed: expected an int or a 0-dim int64 tensor, got None")
    check_seed(seed, torch.empty(0, device=device).device)
    rows = 1
    for d in dims[:-1]:
        rows *= d
    mask = keep_mask(rows, dims[-1], drop_threshold(dropout_p), seed, device)
    return mask.reshape(dims)

"""Dropout's keep mask in plain torch: which elements of a call stay."""

import torch
from torch import Tensor

from lora_kernels.operands.dropout import KEY_STEPS, LANES, MULTIPLIERS, ROUNDS, WORD, Dropout


def philox_4x32_10(counter: Tensor, seed: int | Tensor) -> Tensor:
    """Return the four 32-bit words of Philox-4x32-10 for each counter.

    Args:
        counter: int64 [...], the low 64 bits of the 128-bit counter; the high half is zero.
        seed: the 64-bit key, an int or a 0-dim int64 tensor.

    Returns:
        int64 [..., 4], each value in [0, 2³²).

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1 = counter & WORD, (counter >> 32) & WORD
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        # The 64-bit products wrap into the sign bit; masking after the shift undoes its copies.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD
        c2, c3 = ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def keep_mask(
    rows: int, columns: int, threshold: int, seed: int | Tensor, device: torch.device | str
) -> Tensor:
    """Return the keep mask of a [rows, columns] activation: True where the element stays.

    Element (m, k) takes lane k mod 8 of the Philox call with counter m · ⌈columns / 8⌉ + ⌊k / 8⌋.
    Lane j is the low (j even) or high (j odd) half of word ⌊j / 2⌋; the element stays iff its
    lane is at least `threshold`. Rows start at a fresh counter, so eight aligned columns share
    one call whatever the row length.
    """
    return keep_rows(torch.arange(rows, device=device), columns, threshold, seed)


def keep_rows(rows: Tensor, columns: int, threshold: int, seed: int | Tensor) -> Tensor:
    """Return the rows of a keep mask that are named, int64 [S], as [S, columns]."""
    groups = -(-columns // LANES)
    counter = rows.unsqueeze(1) * groups + torch.arange(groups, device=rows.device)
    words = philox_4x32_10(counter, seed)
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return lanes.reshape(rows.shape[0], groups * LANES)[:, :columns] >= threshold


def dropped(v: Tensor, dropout: Dropout | None, rows: Tensor | None = None) -> Tensor:
    """Return D(v) for v [M, K]; v itself without dropout.

    rows: of the mask, int64 [M], a row of v each; None: in their order.
    """
    if dropout is None:
        return v
    rows = torch.arange(v.shape[0], device=v.device) if rows is None else rows
    keep = keep_rows(rows, v.shape[1], dropout.threshold, dropout.seed)
    return torch.where(keep, v, 0) * dropout.scale

"""The adapted linear layer in plain torch: the definition of right.

Any device, any float dtype, float64 included. Nothing here is tuned: where this file and a
kernel disagree beyond the error budget, the kernel is wrong. float16 decides how numbers are
rounded, not their range: what lies between x and y, or dy and a gradient, is kept in float32.

Notation: M tokens, N out_features, K in_features, R rank.

    forward    y  = x Wᵀ + bias + scaling · xa Bᵀ        xa  = D(x) Aᵀ
    backward   dx = dy W + D(dxa A)                      dxa = scaling · dy B
               dA = dxaᵀ D(x)
               dB = scaling · dyᵀ xa
               dbias = Σ_m dy

D(v) = v · keep · 65536 / (65536 - t) with one keep mask per call (`keep_mask`).
"""

import torch
from torch import Tensor

from lora_kernels.dropout import LANES, keep_scale

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


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
    for _ in range(10):
        # The 64-bit products wrap into the sign bit; masking after the shift undoes its copies.
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD
        c2, c3 = ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & WORD, (k1 + PHILOX_KEY_STEPS[1]) & WORD
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
    groups = -(-columns // LANES)
    counter = torch.arange(rows * groups, dtype=torch.int64, device=device)
    words = philox_4x32_10(counter, seed)
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return lanes.reshape(rows, groups * LANES)[:, :columns] >= threshold


def dropout(v: Tensor, threshold: int, seed: Tensor | None) -> Tensor:
    """Return D(v) for v [M, K]; v itself without dropout."""
    if threshold == 0 or seed is None:
        return v
    keep = keep_mask(v.shape[0], v.shape[1], threshold, seed, v.device)
    return torch.where(keep, v, 0) * keep_scale(threshold)


def _as_matrix(v: Tensor) -> Tensor:
    """Return v [..., C] as contiguous [M, C].

    On CPUs with AMX torch's bf16 products read on beyond rows that lie apart (oneDNN 3.12): by a
    zero, but a NaN there spreads.
    """
    return v.reshape(-1, v.shape[-1]).contiguous()


def rounded(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Return v rounded to dtype; of float16 its 11 significant bits alone, as float32 numbers."""
    if dtype != torch.float16:
        return v.to(dtype)
    mantissa, exponent = torch.frexp(v.float())
    return torch.ldexp(mantissa.half().float(), exponent)


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float | Tensor,
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """Return y = x Wᵀ + bias + scaling · xa Bᵀ and xa = D(x) Aᵀ.

    Args:
        x: [..., K]; leading dimensions are flattened to M.
        weight: [N, K], x's dtype.
        lora_A: [R, K], any float dtype; `rounded` to x's.
        lora_B: [N, R], likewise.
        bias: [N] or None.
        seed: 0-dim int64, the Philox key; None without dropout.
        scaling: a float or a 0-dim tensor.
        threshold: the drop threshold in 1/65536; 0 without dropout.

    Returns:
        y [..., N] and xa [M, R], both in x's dtype.
    """
    a, b = rounded(lora_A, x.dtype), rounded(lora_B, x.dtype)
    x2 = _as_matrix(x)
    xa = (dropout(x2.to(a.dtype), threshold, seed) @ a.T).to(x.dtype)
    y = x2 @ weight.T + (xa.to(b.dtype) @ b.T) * scaling
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0]), xa


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float | Tensor,
    threshold: int,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return dx [..., K], dA [R, K], dB [N, R] and dbias [N], each None where not needed.

    Args:
        dy: [..., N], the gradient of y.
        x: [..., K], needed for dA only.
        xa: [M, R] of the forward call, needed for dB only.
        weight, lora_A, lora_B, seed, scaling, threshold: as in forward.
        needs: whether dx, dA, dB and dbias are wanted, in this order.

    Returns:
        dx and dbias in dy's dtype, dA and dB in their parameters' dtypes.
    """
    a, b = rounded(lora_A, dy.dtype), rounded(lora_B, dy.dtype)
    dy2 = _as_matrix(dy)
    wide = dy2.to(b.dtype)
    dxa = rounded((wide @ b) * scaling, dy.dtype)
    dx = da = db = dbias = None
    if needs[0]:
        dx = dy2 @ weight + dropout(dxa @ a, threshold, seed)
        dx = dx.to(dy.dtype).reshape(*dy.shape[:-1], weight.shape[1])
    if needs[1]:
        assert x is not None
        da = (dxa.T @ dropout(_as_matrix(x).to(a.dtype), threshold, seed)).to(lora_A.dtype)
    if needs[2]:
        assert xa is not None
        db = ((wide.T @ xa.to(b.dtype)) * scaling).to(lora_B.dtype)
    if needs[3]:
        dbias = dy2.sum(0)
    return dx, da, db, dbias

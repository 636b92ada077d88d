"""The numbers that every implementation's dropout agrees on.

Adapter dropout keeps an element iff its 16-bit random lane is at least a threshold, so a
probability is quantised once, here, and crosses every border as that integer. The expectation
stays exact because kept values are scaled by the quantised probability's inverse.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 65536
LANES = 8  # elements served by one Philox-4x32 call: four 32-bit words, two 16-bit lanes each
# Philox-4x32-10's own (Salmon et al., SC 2011).
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Dropout(NamedTuple):
    """A call's mask: its key, 0-dim int64, and the drop threshold in 1/65536, at least 1."""

    seed: Tensor
    threshold: int

    @property
    def scale(self) -> float:
        """The factor on kept elements."""
        return keep_scale(self.threshold)


def drawn(dropout_p: float, seed: int | Tensor | None, device: torch.device) -> Dropout | None:
    """Return the dropout of a call with this probability; None where nothing is dropped.

    seed: None draws one from torch's generator of the device.
    """
    threshold = drop_threshold(dropout_p)
    if threshold == 0:
        return None
    if seed is None:
        seed = torch.randint(0, 1 << 62, (), dtype=torch.int64, device=device)
    elif not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=device)
    return Dropout(seed, threshold)


def drop_threshold(dropout_p: float) -> int:
    """Return t = round(65536 p), at most 65535: an element is dropped iff its lane is below t."""
    return min(round(dropout_p * LEVELS), LEVELS - 1)


def keep_scale(threshold: int) -> float:
    """Return 65536 / (65536 - t), the factor on kept elements; 1.0 without dropout."""
    return LEVELS / (LEVELS - threshold)

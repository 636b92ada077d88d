"""What an implementation may ask about a call before it accepts it."""

from typing import NamedTuple

import torch


class Request(NamedTuple):
    """A kind of call, as far as a refusal depends on it."""

    device: torch.device
    dtype: torch.dtype  # of x, W, y
    rank: int
    dropout: bool

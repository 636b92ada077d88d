"""What an implementation may ask about a call before it accepts it."""

from typing import NamedTuple

import torch


class Request(NamedTuple):
    """A kind of call, as far as a refusal depends on it."""

    device: torch.device
    dtype: torch.dtype  # of x, W, y
    rank: int
    dropout: bool


def without_data(request: Request) -> str | None:
    """Return why torch's own operators can't compute the request, or None."""
    if request.device.type == "meta":
        return "a meta tensor holds no data to compute with"
    return None

"""What an implementation may ask about a call before it accepts it."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from lora_kernels.operands.formats import format_served


class Request(NamedTuple):
    """A kind of call, as far as a refusal depends on it."""

    op: str
    device: torch.device
    dtype: torch.dtype  # of x, W, y
    rank: int
    dropout: bool
    format: str = "dense"  # of W


# A bare tuple of a Request's fields equals it, and takes a fifth of the time to make.
Asked = tuple[str, torch.device, torch.dtype, int, bool, str]


def unserved(request: Request, ops: Mapping[str, tuple[str, ...]]) -> str | None:
    """Return why who has these ops, with these formats of W, has not the request's, or None."""
    formats = ops.get(request.op)
    if formats is None:
        return f"has no {request.op}"
    if format_served(request.format, formats) is None:
        return f"reads weights of format {' or '.join(formats)}, got {request.format}"
    return None


def without_data(request: Request) -> str | None:
    """Return why torch's own operators can't compute the request, or None."""
    if request.device.type == "meta":
        return "a meta tensor holds no data to compute with"
    return None

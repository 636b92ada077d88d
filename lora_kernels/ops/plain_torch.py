"""Which calls of the newer ops are made of torch's own operators, by the reference's formulas."""

import torch

from lora_kernels.dispatch import check_plain
from lora_kernels.transforms import needs_plain_torch


def is_plain_torch(impl: str) -> bool:
    """Whether torch looks into this call: transforms, forward mode, traces, exports, FLOP counts.

    Raises:
        ValueError: it does, and a named implementation can't serve that.
    """
    if not (needs_plain_torch() or torch.compiler.is_exporting()):
        return False
    check_plain(impl, exported=True)
    return True

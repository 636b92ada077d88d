"""Which calls of the newer ops are made of torch's own operators, by the reference's formulas."""

import torch

from lora_kernels.transforms import needs_plain_torch


def is_plain_torch(impl: str) -> bool:
    """Whether torch looks into this call: transforms, forward mode, traces, exports, FLOP counts.

    Raises:
        ValueError: it does, and a named implementation can't serve that.
    """
    if not (needs_plain_torch() or torch.compiler.is_exporting()):
        return False
    if impl not in ("auto", "reference"):
        raise ValueError(
            f"impl: {impl!r} can't serve this call: inside torch.func transforms, forward-mode "
            'differentiation, traces, exports and FLOP counts "auto" and "reference" compute by '
            "torch's own operators"
        )
    return True

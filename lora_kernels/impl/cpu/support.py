"""What the compiled CPU part serves, or why not."""

import torch

from lora_kernels.native import BUILT, absence
from lora_kernels.operands.request import Request, unserved

SUMMARY = "compiled C++ beside the library's GEMMs, CPUs"
# And the formats of W.
OPS = {
    "lora_linear": ("dense", "onednn", "nf4", "fp4", "int8", "float8"),
    "lora_dora_linear": ("dense",),
    "grouped_lora_linear": ("dense",),
    "mixed_lora_linear": ("dense",),
    "lora_embedding": ("dense",),
}
# 2026-11-24, Zen 5, 512x2048x2048: 0.99 of eager's time at rank 64, 1.07 at 256 (bfloat16, p = 0).
MAX_RANK = 256


def refuse(request: Request) -> str | None:
    """Return why a call can't be served, or None."""
    reason = unserved(request, OPS)
    if reason is not None:
        return reason
    if request.device.type != "cpu":
        return f"needs a CPU, got {request.device.type}"
    if request.dtype not in (torch.bfloat16, torch.float32):
        return f"needs bfloat16 or float32, got {request.dtype}"
    if request.rank > MAX_RANK:
        return f"needs a rank of at most {MAX_RANK}, got {request.rank}"
    # Last: a part that couldn't serve the call isn't missed. torch.compile can't trace the loading.
    return None if torch.compiler.is_compiling() and BUILT["cpu"] else absence("cpu")

"""What the compiled CUDA part serves, or why not."""

import torch

from lora_kernels.impl import executor, gpu
from lora_kernels.native import BUILT, absence
from lora_kernels.operands.request import Request, unserved

SUMMARY = "compiled CUDA C++ kernels, devices from sm_80 up"
OPS = {"lora_linear": ("dense", "nf4", "fp4")}  # and the formats of W


def refuse(request: Request) -> str | None:
    """Return why a call can't be served, or None."""
    reason = unserved(request, OPS)
    if reason is not None:
        return reason
    reason = None if executor.of("cuda") is not None else gpu.refusal(request.device)
    reason = reason or gpu.unfit(request)
    if reason is not None:
        return reason
    return None if torch.compiler.is_compiling() and BUILT["cuda"] else absence("cuda")

"""What Triton's kernels serve, or why not."""

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch

from lora_kernels.impl import executor, gpu
from lora_kernels.operands.request import Request, unserved

SUMMARY = "fused Triton kernels, CUDA devices from sm_80 up"
# And the formats of W.
OPS = {
    "lora_linear": ("dense", "nf4", "fp4", "int8", "float8"),
    "lora_dora_linear": ("dense",),
    "grouped_lora_linear": ("dense",),
}
# Of GPUs for which Triton's code is executed in tests, or is that of one which is.
GENERATIONS = (8, 9, 10, 12)
OLDEST_TRITON = (3, 6)
NO_TRITON = "triton is not installed"


def refuse(request: Request) -> str | None:
    """Return why a call can't be served, or None."""
    reason = unserved(request, OPS)
    if reason is not None:
        return reason
    if executor.of("triton") is not None:
        reason = None if _has_triton() else NO_TRITON
    else:
        reason = gpu.refusal(request.device) or _gpu_refusal(request.device)
    return reason or gpu.unfit(request)


def _gpu_refusal(device: torch.device) -> str | None:
    major, minor = gpu.capability(device)
    if major not in GENERATIONS:
        known = ", ".join(f"{generation}.x" for generation in GENERATIONS)
        return f"needs compute capability {known}, got {major}.{minor}"
    # Under torch.compile, which can't trace the question, a GPU's own compiler needs the same.
    return None if torch.compiler.is_compiling() else _launcher_refusal()


@cache
def _has_triton() -> bool:
    try:
        return find_spec("triton") is not None
    except ImportError:  # what stands in for finders in this process refuses the name
        return False


def absence() -> str | None:
    """Return why there is no Triton that the kernels can be compiled with, or None."""
    if not _has_triton():
        return NO_TRITON
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"needs triton {oldest} or newer, got {triton.__version__}"
    return None


@cache
def _launcher_refusal() -> str | None:
    """Return why Triton can't compile and launch for a GPU in this process, or None."""
    reason = absence()
    if reason is not None:
        return reason
    import triton

    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set: it runs one program after the other, and they wait"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if triton.knobs.build.impl is None and not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler, expected {' or '.join(compilers)} on PATH"
    return None

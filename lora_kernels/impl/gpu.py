"""What implementations for GPUs ask of a device, a call, torch's switches and its allocator."""

from functools import cache

import torch
from torch import Tensor

from lora_kernels.operands.request import Request

MAX_RANK = 256


def refusal(device: torch.device) -> str | None:
    """Return why no kernel runs on a device, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"needs a CUDA device, got {device.type}"
    major, minor = capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or newer, got {major}.{minor}"
    return None


def unfit(request: Request) -> str | None:
    """Return why no kernel takes a call, on whatever device, or None."""
    if request.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {request.dtype}"
    if request.rank > MAX_RANK:
        return f"needs a rank of at most {MAX_RANK}, got {request.rank}"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability."""
    if torch.compiler.is_compiling():  # folds this call, but can't call a cached function
        properties = torch.cuda.get_device_properties(device)
        return properties.major, properties.minor
    return _cached_capability(device)


@cache
def _cached_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def tf32_allowed() -> bool:
    """Whether float32 products may be TF32's, by torch's own switch as it is now.

    Asked in the newer of torch's two forms, which knows what either form has set; the older one,
    `torch.get_float32_matmul_precision`, raises where the newer one was used.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def spared_multiprocessors() -> int:
    """Return how many multiprocessors torch leaves to others, as its switch is now."""
    return torch._C._get_sm_carveout_experimental() or 0


def in_shared_pool(t: Tensor) -> bool:
    """Whether t lies where all calls allocate, and not in a pool of somebody's own.

    Graphs have such pools, `torch.compile(mode="reduce-overhead")` from its first runs on, before
    anything is captured, and `torch.cuda.use_mem_pool`: their owners count on what isn't theirs
    being freed. Asked of a snapshot, which takes milliseconds.
    """
    if t.device.type != "cuda" or not torch.backends.cuda.is_built():
        return True
    if torch.cuda.get_allocator_backend() != "native":
        return False  # can't say
    address = t.data_ptr()
    return any(
        tuple(segment["segment_pool_id"]) == (0, 0)
        and segment["device"] == t.device.index
        and 0 <= address - segment["address"] < segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
    )

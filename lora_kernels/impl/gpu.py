"""What torch says of a GPU: its switch of float32 products, its allocator's pools."""

import torch
from torch import Tensor


def tf32_allowed() -> bool:
    """Whether float32 products may be TF32's, by torch's own switch as it is now.

    Asked in the newer of torch's two forms, which knows what either form has set; the older one,
    `torch.get_float32_matmul_precision`, raises where the newer one was used.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


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

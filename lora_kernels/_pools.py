"""Which memory of torch's allocator may be kept from call to call."""

import torch
from torch import Tensor


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

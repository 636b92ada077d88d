"""Flags between programs: int32 zeros that every launch leaves as it found them."""

from threading import Lock

import torch
from torch import Tensor

from lora_kernels.impl.gpu import in_shared_pool

_GRAIN = 4096


class Workspace:
    """One block of zeros per (device, stream): two streams never share flags.

    Under CUDA-graph capture a block belongs to the call that asked for it, in the graph's own
    memory: graphs captured on one stream may be replayed on several at once. So it does where the
    allocator serves the call from a pool of its own.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.device, int], Tensor] = {}
        self._lock = Lock()

    def zeros(self, count: int, device: torch.device) -> Tensor:
        """Return at least `count` int32 zeros for the current stream of the device."""
        stream = 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(count, dtype=torch.int32, device=device)
            stream = torch.cuda.current_stream(device).cuda_stream
        key = (device, stream)
        with self._lock:
            block = self._blocks.get(key)
            if block is None or block.numel() < count:
                size = -(-count // _GRAIN) * _GRAIN
                block = torch.zeros(size, dtype=torch.int32, device=device)
                if in_shared_pool(block):
                    self._blocks[key] = block
        return block

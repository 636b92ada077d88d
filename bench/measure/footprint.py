"""What a call launches, keeps for backward and allocates: counts, taken once and not timed."""

import ctypes
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench.providers.calls import Call, make_slots
from bench.providers.registry import BY_NAME
from bench.shapes import Case

# From malloc.h. Left to itself glibc raises the size from which memory is given back at once: peaks
# then show how the heap is fragmented, and those of one call differed by a third.
MMAP_THRESHOLD, THRESHOLD_BYTES = -3, 64 << 10
MIB = 2**20
ALLOCATIONS = ("empty", "new_empty", "_unsafe_view", "_efficientzerotensor")


Result = TypeVar("Result")


@dataclass(frozen=True)
class Footprint:
    """What one call costs beside time.

    launches: operators that compute, on CPUs; kernels, on CUDA; None where they can't be counted.
    saved_bytes: kept for backward beyond x and the parameters. peak_bytes: what the call adds to
    the process's resident memory (CUDA: to the allocator's) at most, gradients included.
    """

    launches: int | None
    saved_bytes: int
    peak_bytes: int


class Probe:
    """Runs what counts memory: on CPUs in a process of its own, where nothing else allocates."""

    def __init__(self, device: str) -> None:
        self.device = device
        # The process starts at the first question.
        self._pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_prepare, initargs=(torch.get_num_threads(),)
        )

    def run(self, count: Callable[..., Result], *args: Any) -> Result:
        """Return what a function returns; on CPUs function and arguments must be picklable."""
        if self.device == "cuda":
            return count(*args)
        return self._pool.submit(count, *args).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(cancel_futures=True)


def _prepare(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    torch.set_num_threads(threads)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, THRESHOLD_BYTES)


def footprint(case: Case, provider: str, device: str) -> Footprint:
    """Count a provider's launches, saved and allocated bytes in this process."""
    torch.compiler.reset()
    [[call]] = make_slots([BY_NAME[provider]], case, device, 1)
    call()  # what is made once is none of a call's
    saved = saved_bytes(call.forward, [call.x], call.layer) if call.train else 0
    launched = launches(call, provider, device)
    return Footprint(launched, saved, peak_bytes(call, device))


def launches(call: Call, provider: str, device: str) -> int | None:
    """Count the kernels of a call, or on CPUs its operators, views and allocations aside."""
    if device == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as log:
            call()
            torch.cuda.synchronize()
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in log.events())
    if BY_NAME[provider].compiles:  # such a mode makes compiled code run as if it weren't
        return None
    with _Counter() as counter:
        call()
    return counter.count


class _Counter(TorchDispatchMode):
    lora_kernels_only_looks = True  # else a patched layer would keep PEFT's forward
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func._opname.startswith(ALLOCATIONS):
            self.count += 1
        return func(*args, **(kwargs or {}))


def saved_bytes(forward: Callable[[], Any], inputs: list[Tensor], layer: nn.Module) -> int:
    """Return the bytes that a forward keeps for backward beyond its inputs and the parameters."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Views share a storage; the graph keeps it alive, so no address comes up twice.
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    for tensor in (*inputs, *layer.parameters()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    del kept
    return sum(saved.values())


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Return what a call adds at most to the memory in use."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

"""The seam between csrc/cuda and whoever runs its launches on tensors that are not a GPU's.

A call is the library's own up to the launches: it plans, allocates and fills in parameters. What it
asks for then goes to this context's executor, by operators, and the executor runs each launch
before the call goes on.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lora_kernels.impl import executor

_OF_A_GPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


class Launch(NamedTuple):
    """A launch of a compiled kernel.

    together: how many programs must run at the same time for any to go on.
    params: the kernel's parameter, a struct of csrc/cuda/host/params.h.
    memory: all that it may touch.
    """

    kernel: str
    programs: int
    threads: int
    shared_bytes: int
    together: int
    params: bytes
    memory: Sequence[Tensor]


class Executor(executor.Executor, Protocol):
    """Runs compiled kernels in a GPU's stead."""

    def device(self, x: Tensor) -> Sequence[int]:
        """Return what is planned for: [arch, multiprocessors, bytes of shared memory]."""
        ...

    def flags(self, like: Tensor, count: int) -> Tensor:
        """Return at least so many int32 zeros, which every launch leaves as it found them."""
        ...

    def run(self, launch: Launch) -> None:
        """Run a launch to its end."""
        ...


class _Asked:
    """An executor in a call, with its error: C++ doesn't pass on an exception of Python's."""

    impl = "cuda"

    def __init__(self, running: Executor) -> None:
        self.running = running
        self.error: BaseException | None = None

    def ask(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self.running, name)(*args)
        except BaseException as error:
            self.error = error
            raise


def call(operator: Any, args: tuple[Any, ...]) -> Any:
    """Call an operator's kernel for a GPU on other tensors: its launches are this context's."""
    asked = _Asked(executor.of("cuda"))
    with executor.using(asked):
        try:
            return operator.redispatch(_OF_A_GPU, *args)
        except RuntimeError:
            if asked.error is None:
                raise
            raise asked.error from None


def _device(x: Tensor) -> list[int]:
    return list(executor.of("cuda").ask("device", x))


def _zeros(like: Tensor, count: int) -> Tensor:
    return executor.of("cuda").ask("flags", like, count)


def _launch(kernel: str, numbers: list[int], params: list[int], memory: list[Tensor]) -> None:
    programs, threads, shared_bytes, together = numbers
    launch = Launch(kernel, programs, threads, shared_bytes, together, bytes(params), memory)
    executor.of("cuda").ask("run", launch)


# What the library asks in a call, each by an operator: its schema and its body.
ASKED: dict[str, Callable[..., Any]] = {
    "executor_device(Tensor x) -> int[]": _device,
    "executor_zeros(Tensor like, int count) -> Tensor": _zeros,
    "executor_launch(str kernel, int[] numbers, int[] params, Tensor[] memory) -> ()": _launch,
}

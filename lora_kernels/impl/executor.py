"""What runs kernels in a GPU's stead: an interpreter or a machine, for tests and counts."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Protocol, TypeVar

import torch


class Executor(Protocol):
    """Runs the kernels of one implementation, `impl`, on tensors of any device."""

    impl: str


_EXECUTOR: ContextVar[Any] = ContextVar("executor", default=None)
AnyExecutor = TypeVar("AnyExecutor", bound=Executor | None)


def replaced() -> str | None:
    """Return whose kernels are run in a GPU's stead in this context, if any's are.

    None's under torch.compile, which can't trace the question.
    """
    return None if torch.compiler.is_compiling() else of_context()


def of_context() -> str | None:
    """Return the same where torch.compile doesn't trace."""
    executor = _EXECUTOR.get()
    return None if executor is None else executor.impl


def of(impl: str) -> Any:
    """Return the executor of this context if it runs the kernels of `impl`, else None."""
    return _EXECUTOR.get() if replaced() == impl else None


@contextmanager
def using(executor: AnyExecutor) -> Iterator[AnyExecutor]:
    """Let an executor, which is yielded, run the kernels of this context; None is the GPU's own."""
    token = _EXECUTOR.set(executor)
    try:
        yield executor
    finally:
        _EXECUTOR.reset(token)


@cache
def load(ptx: str) -> Any:
    """Load PTX in the virtual machine `ptxvm`, an optional tool that executes it on a CPU.

    Its clock stands still, so that waits for other programs have no limit: the machine proves that
    a wait has no end by its state, in which no clock may run.
    """
    import ptxvm

    return ptxvm.load(ptx.replace("%globaltimer_hi", "0"))

"""Compile calls' kernels ahead, in processes of their own, into the cache that launches read.

No GPU is needed: each process has a driver that only says which one is meant. Triton's own launch
then computes what it would look for, and compiles it.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from lora_kernels._progress import Progress
from lora_kernels.impl.triton.plan.config import AnyConfig, Problem
from lora_kernels.impl.triton.plan.device import Device, known
from lora_kernels.impl.triton.plan.plan import rounded
from lora_kernels.impl.triton.plan.tuned import key_of, planned
from lora_kernels.impl.triton.tools.layers import layers_of
from lora_kernels.impl.triton.tools.record import Launch, Made, recorded

_WARP = 32


class Job(NamedTuple):
    """A call of a layer whose kernels are compiled."""

    problem: Problem
    config: AnyConfig
    device: Device
    made: Made


def main(gpu: str, shapes: Sequence[str], made: Made, processes: int | None) -> int:
    """Compile what calls of these shapes launch on a GPU; return an exit status.

    That is by the measured plans of that GPU, if this machine has its file, or else the predicted.
    """
    device = known(gpu)
    try:
        problems = layers_of(shapes, made.dtype.itemsize * 8)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    plans = {problem: planned(rounded(problem), device) for problem in problems}
    jobs = [Job(problem, plan.config, device, made) for problem, plan in plans.items()]
    failed = []
    with Progress(len(jobs), "call") as progress:

        def done(job: Job, reason: str | None) -> None:
            progress.advance()
            if reason is not None:
                failed.append(job)
                progress.say(f"{key_of(job.problem)}: {reason}")

        compile_all(jobs, processes, done)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} calls compiled for {device.name}")
    return 1 if failed else 0


class _Driver:
    """Answers what Triton asks a driver before it compiles."""

    def __init__(self, target: int) -> None:
        self._target = GPUTarget("cuda", target, _WARP)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:  # noqa: ARG002  Triton's
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def compile_all(
    jobs: Iterable[Job], processes: int | None, done: Callable[[Job, str | None], object]
) -> None:
    """Compile the kernels of all jobs.

    Args:
        jobs: of one GPU.
        processes: how many at a time; None: as many as this process may use CPUs.
        done: is told of each job as it ends, and why it failed, if it did.
    """
    waiting = list(jobs)
    if not waiting:
        return
    count = min(processes or len(os.sched_getaffinity(0)), len(waiting))
    target = waiting[0].device.target
    with ProcessPoolExecutor(count, get_context("spawn"), _start, (target,)) as pool:
        futures = {pool.submit(_compile, job): job for job in waiting}
        for future in as_completed(futures):
            error = future.exception()
            reason = None if error is None else f"{type(error).__name__}: {error}"
            done(futures[future], reason)


def _start(target: int) -> None:
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(_Driver(target))


def _compile(job: Job) -> None:
    """Compile one job's kernels; what a process has compiled it doesn't compile again."""
    made = job.made._replace(memory="cpu", fill=torch.empty)  # nobody reads a number
    for call in recorded(job.problem, job.config, job.device, made):
        if isinstance(call, Launch):
            _warm(call)


def _warm(launch: Launch) -> Any:
    how = launch.how
    return launch.kernel.warmup(
        **launch.args, **launch.constants, grid=(1,), num_warps=how.num_warps,
        num_stages=how.num_stages, enable_fp_fusion=True,
    )  # fmt: skip

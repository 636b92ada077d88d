"""Time the library plan and the most promising configurations of layers, and keep the fastest.

A tool, never part of a call: nothing is tuned in a user's step. Kernels are compiled ahead by
several processes. The frozen layer and PEFT's own operators are timed beside.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lora_kernels._progress import Progress
from lora_kernels.impl.triton.launch import Gpu
from lora_kernels.impl.triton.plan.config import (
    AnyConfig,
    Config,
    Problem,
    library_config,
)
from lora_kernels.impl.triton.plan.device import Device, of_gpu
from lora_kernels.impl.triton.plan.plan import one_launch_configs, plan, plan_of
from lora_kernels.impl.triton.plan.tuned import Measured, key_of, path_of, write
from lora_kernels.impl.triton.tools.ahead import Job, compile_all
from lora_kernels.impl.triton.tools.layers import layers_of
from lora_kernels.impl.triton.tools.record import Made, recorded
from lora_kernels.impl.triton.tools.rivals import frozen, peft

Timer = Callable[[Problem, AnyConfig], float]
NO_GPU = "tune: needs a CUDA GPU of compute capability 8.0 or newer; none is visible to torch"


def candidates(problem: Problem, device: Device, most: int | None = None) -> list[AnyConfig]:
    """Return what may serve: the library plan, and one launch, the fastest by the cost model first.

    most: how many of one launch; None for all.
    """
    legal = sorted(one_launch_configs(problem, device))
    likely = sorted(legal, key=lambda c: plan_of(c, problem, device).seconds)
    return [library_config(problem), *likely[:most]]


def fastest(
    problem: Problem,
    device: Device,
    timer: Timer,
    say: Callable[[str], object],
    most: int | None = None,
    keep: Callable[[AnyConfig, float], object] | None = None,
) -> tuple[AnyConfig, float]:
    """Return the legal configuration with the shortest measured time, and that time in seconds.

    A configuration that this GPU or this Triton can't run is reported and left out.

    Args:
        problem: the call.
        device: the GPU that is measured.
        timer: returns the seconds of a configuration.
        say: gets a line of progress.
        most: how many of one launch are timed, as `candidates`; None for all.
        keep: gets the best so far, whenever there is a better one.
    """
    times: dict[AnyConfig, float] = {}
    for config in candidates(problem, device, most):
        try:
            time = timer(problem, config)
        except Exception as error:  # Triton and the driver raise many kinds
            say(f"  left out, {type(error).__name__}: {error} ({config})")
            continue
        if keep is not None and time < min(times.values(), default=math.inf):
            keep(config, time)
        times[config] = time
    if not times:
        raise RuntimeError(f"tune: no configuration of {key_of(problem)} ran")
    best = min(times, key=lambda config: times[config])
    predicted = plan(problem, device).config
    ratio = times[predicted] / times[best] if predicted in times else float("nan")
    say(f"{key_of(problem)}: {times[best] * 1e6:.1f} us, the cost model's choice {ratio:.2f} of it")
    return best, times[best]


def gpu_timer(made: Made) -> Timer:
    """Return a timer of launches on the current GPU: median, cold L2, after a warm-up."""
    gpu = Gpu()

    def time(problem: Problem, config: AnyConfig) -> float:
        device = of_gpu(torch.cuda.current_device())
        called = recorded(problem, config, device, made)

        def call() -> None:
            for each in called:
                each.play(gpu)

        return _seconds(call)

    return time


def _seconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median")) * 1e-3


def main(
    shapes: Sequence[str], made: Made, out: Path | None, most: int | None, processes: int | None
) -> int:
    """Tune on the current GPU and write the file as results come; return an exit status.

    made: how tensors are made, on the GPU. processes: that compile ahead.
    """
    try:
        problems = layers_of(shapes, made.dtype.itemsize * 8)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not has_gpu():
        print(NO_GPU, file=sys.stderr)
        return 2
    device = of_gpu(torch.cuda.current_device())
    path = out or path_of(device)
    with Progress(sum(len(candidates(p, device, most)) for p in problems), "configuration") as bar:
        tune(problems, device, made, path, Run(bar, most, processes))
    print(f"written to {path}")
    return 0


class Run(NamedTuple):
    """How a run goes: its progress, how many configurations, how many processes compile."""

    progress: Progress
    most: int | None
    processes: int | None


def tune(problems: Sequence[Problem], device: Device, made: Made, path: Path, run: Run) -> None:
    """Compile ahead what is timed, time it, and write the best of each call as it comes."""
    say = run.progress.say
    wanted = [(p, c) for p in problems for c in candidates(p, device, run.most)]
    jobs = [Job(problem, config, device, made) for problem, config in wanted]

    def done(job: Job, reason: str | None) -> None:
        if reason is not None:
            say(f"  not compiled, {reason} ({job.config})")

    compile_all(jobs, run.processes, done)
    timer = gpu_timer(made)
    for problem in problems:
        base, others = (_seconds(make(problem, made)) for make in (frozen, peft))
        say(f"{key_of(problem)}: frozen {base * 1e6:.1f} us, PEFT's operators {others * 1e6:.1f}")
        keep = partial(_keep, path, device, key_of(problem), others)
        fastest(problem, device, _counted(timer, run.progress), say, run.most, keep)


def has_gpu() -> bool:
    """Whether torch sees a GPU that Triton's kernels run on."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _counted(timer: Timer, progress: Progress) -> Timer:
    def time(problem: Problem, config: AnyConfig) -> float:
        try:
            return timer(problem, config)
        finally:
            progress.advance()

    return time


def _keep(
    path: Path, device: Device, key: str, others: float, config: AnyConfig, time: float
) -> None:
    kept = config if isinstance(config, Config) else None
    write(path, device, {key: Measured(kept, time, others)})

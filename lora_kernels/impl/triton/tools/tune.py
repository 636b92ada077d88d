"""Time the library plan and every legal configuration of a few layers, and keep the fastest.

A tool, never part of a call: nothing is tuned in a user's step.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

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
from lora_kernels.impl.triton.plan.tuned import key_of, path_of, write
from lora_kernels.impl.triton.tools.record import calls

Timer = Callable[[Problem, AnyConfig], float]
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)")
NO_GPU = "tune: needs a CUDA GPU of compute capability 8.0 or newer; none is visible to torch"


def layers_of(shapes: Iterable[str], bits: int) -> list[Problem]:
    """Return the calls that a shape MxNxKxR stands for: both directions, with and without dropout.

    Raises:
        ValueError: a shape is not four positive numbers.
    """
    problems = []
    for shape in shapes:
        found = _SHAPE.fullmatch(shape)
        m, n, k, r = map(int, found.groups()) if found else (0, 0, 0, 0)
        if min(m, n, k, r) < 1:
            raise ValueError(f"shapes: expected MxNxKxR like 8192x4096x4096x16, got {shape!r}")
        for backward in (False, True):
            for dropout in (False, True):
                problems.append(Problem(m, n, k, r, bits, dropout, True, backward))
    return problems


def candidates(problem: Problem, device: Device, most: int | None = None) -> list[AnyConfig]:
    """Return what may serve, or `most` of it: the fastest by the cost model first."""
    legal = sorted(one_launch_configs(problem, device))
    found: list[AnyConfig] = [library_config(problem), *legal]
    return sorted(found, key=lambda c: plan_of(c, problem, device).seconds)[:most]


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
        most: how many are timed, those that the cost model predicts to be fastest; None for all.
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


def gpu_timer(dtype: torch.dtype) -> Timer:
    """Return a timer of launches on the current GPU: median, cold L2, after a warm-up."""
    from triton.testing import do_bench

    gpu = Gpu()

    def time(problem: Problem, config: AnyConfig) -> float:
        device = of_gpu(torch.cuda.current_device())
        recorded = calls(problem, config, device, dtype, "cuda")

        def call() -> None:
            for each in recorded:
                each.play(gpu)

        return float(do_bench(call, return_mode="median")) * 1e-3

    return time


def main(shapes: list[str], dtype: str, out: Path | None, most: int | None = None) -> int:
    """Tune on the current GPU and write the file as results come; return an exit status."""
    wanted = getattr(torch, dtype)
    try:
        problems = layers_of(shapes, wanted.itemsize * 8)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        print(NO_GPU, file=sys.stderr)
        return 2
    device = of_gpu(torch.cuda.current_device())
    path, timer = out or path_of(device), gpu_timer(wanted)
    total = sum(len(candidates(problem, device, most)) for problem in problems)
    with Progress(total, "configuration") as progress:
        for problem in problems:
            keep = partial(_keep, path, device, key_of(problem))
            fastest(problem, device, _counted(timer, progress), progress.say, most, keep)
    print(f"written to {path}")
    return 0


def _counted(timer: Timer, progress: Progress) -> Timer:
    def time(problem: Problem, config: AnyConfig) -> float:
        try:
            return timer(problem, config)
        finally:
            progress.advance()

    return time


def _keep(path: Path, device: Device, key: str, config: AnyConfig, time: float) -> None:
    write(path, device, {key: (config if isinstance(config, Config) else None, time)})

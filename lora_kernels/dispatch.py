"""Which implementation serves a call, or the reason why one does not."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from lora_kernels.impl.cuda import machine
from lora_kernels.impl.triton import launch
from lora_kernels.impl.triton.plan.config import MAX_RANK
from lora_kernels.native import BUILT, absence
from lora_kernels.ops import backward_op, forward_op

# Generations of GPUs for which Triton's code is executed in tests, or is that of one which is.
TRITON_GENERATIONS = (8, 9, 10, 12)
OLDEST_TRITON = (3, 6)
NO_TRITON = "triton is not installed"
# 2026-11-24, Zen 5, 512x2048x2048: 0.99 of eager's time at rank 64, 1.07 at 256 (bfloat16, p = 0).
MAX_CPU_RANK = 256


class Problem(NamedTuple):
    """What an implementation may ask about a call before it accepts it."""

    device: torch.device
    dtype: torch.dtype  # of x, W, y
    rank: int
    dropout: bool


def _cpu_refusal(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"needs a CPU, got {problem.device.type}"
    if problem.dtype not in (torch.bfloat16, torch.float32):
        return f"needs bfloat16 or float32, got {problem.dtype}"
    if problem.rank > MAX_CPU_RANK:
        return f"needs a rank of at most {MAX_CPU_RANK}, got {problem.rank}"
    # Last: a part that couldn't serve the call isn't missed. torch.compile can't trace the loading.
    return None if torch.compiler.is_compiling() and BUILT["cpu"] else absence("cpu")


def _needs_data(problem: Problem) -> str | None:
    if problem.device.type == "meta":
        return "a meta tensor holds no data to compute with"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    if torch.compiler.is_compiling():  # folds this call, but can't call a cached function
        properties = torch.cuda.get_device_properties(device)
        return properties.major, properties.minor
    return _cached_capability(device)


@cache
def _cached_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _has_triton() -> bool:
    try:
        return find_spec("triton") is not None
    except ImportError:  # what stands in for finders in this process refuses the name
        return False


def triton_absence() -> str | None:
    """Return why there is no Triton that the kernels can be compiled with, or None."""
    if not _has_triton():
        return NO_TRITON
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"needs triton {oldest} or newer, got {triton.__version__}"
    return None


@cache
def _launcher_refusal() -> str | None:
    """Return why Triton can't compile and launch for a GPU in this process, or None."""
    reason = triton_absence()
    if reason is not None:
        return reason
    import triton

    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set: it runs one program after the other, and they wait"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if triton.knobs.build.impl is None and not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler, expected {' or '.join(compilers)} on PATH"
    return None


def _gpu_refusal(problem: Problem) -> str | None:
    if problem.device.type != "cuda" or torch.version.hip:
        return f"needs a CUDA device, got {problem.device.type}"
    major, minor = _capability(problem.device)
    if major < 8:
        return f"needs compute capability 8.0 or newer, got {major}.{minor}"
    return None


def _cuda_refusal(problem: Problem) -> str | None:
    reason = None if machine.active() else _gpu_refusal(problem)
    reason = reason or _unfit_for_a_gpu(problem)
    if reason is not None:
        return reason
    return None if torch.compiler.is_compiling() and BUILT["cuda"] else absence("cuda")


def _unfit_for_a_gpu(problem: Problem) -> str | None:
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {problem.dtype}"
    if problem.rank > MAX_RANK:
        return f"needs a rank of at most {MAX_RANK}, got {problem.rank}"
    return None


def _triton_gpu_refusal(problem: Problem) -> str | None:
    major, minor = _capability(problem.device)
    if major not in TRITON_GENERATIONS:
        known = ", ".join(f"{generation}.x" for generation in TRITON_GENERATIONS)
        return f"needs compute capability {known}, got {major}.{minor}"
    # Under torch.compile, which can't trace the question, a GPU's own compiler needs the same.
    return None if torch.compiler.is_compiling() else _launcher_refusal()


def _triton_refusal(problem: Problem) -> str | None:
    if launch.replaced():
        reason = None if _has_triton() else NO_TRITON
    else:
        reason = _gpu_refusal(problem) or _triton_gpu_refusal(problem)
    return reason or _unfit_for_a_gpu(problem)


@dataclass(frozen=True)
class Implementation:
    """One way to compute the layer: its operators, and `refuse`, a reason or None for a problem."""

    name: str
    summary: str
    refuse: Callable[[Problem], str | None]
    forward: Any = field(init=False, repr=False)
    backward: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward", forward_op(self.name))
        object.__setattr__(self, "backward", backward_op(self.name))


# In the order in which "auto" tries them.
IMPLEMENTATIONS = (
    Implementation("triton", "fused Triton kernels, CUDA devices from sm_80 up", _triton_refusal),
    Implementation("cuda", "compiled CUDA C++ kernels, devices from sm_80 up", _cuda_refusal),
    Implementation("cpu", "compiled C++ beside the library's GEMMs, CPUs", _cpu_refusal),
    Implementation("eager", "few, in-place ATen calls, any device", _needs_data),
    Implementation("reference", "plain torch, the definition of right, any device", _needs_data),
)
_BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
CHOICES = ("auto", *_BY_NAME)


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is "auto" or names an implementation of this version."""
    if impl not in CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, CHOICES))}, got {impl!r}")


def choose(
    impl: str, device: torch.device, dtype: torch.dtype, rank: int, dropout: bool
) -> Implementation:
    """Return the named implementation, or with "auto" the first that accepts the problem.

    Raises:
        ValueError: `impl` is unknown, or refuses the problem; an explicit choice never falls back.
    """
    if torch.compiler.is_compiling():  # folds the choice, but can't call a cached function
        return _choose(impl, Problem(device, dtype, rank, dropout))
    return _cached_choice(impl, device, dtype, rank, dropout, launch.replaced(), machine.active())


@cache
def _cached_choice(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    rank: int,
    dropout: bool,
    _replaced: bool,
    _active: bool,
) -> Implementation:
    """Choose once for a kind of call; the last two are all that a choice depends on besides."""
    return _choose(impl, Problem(device, dtype, rank, dropout))


def _choose(impl: str, problem: Problem) -> Implementation:
    if impl == "auto":
        for implementation in IMPLEMENTATIONS:
            if implementation.refuse(problem) is None:
                return implementation
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals(problem).items())
        raise ValueError(f"impl: no implementation serves this call ({reasons})")
    check_impl(impl)
    reason = refusal(impl, problem)
    if reason is not None:
        raise ValueError(f"impl: {impl!r} can't serve this call: {reason}")
    return _BY_NAME[impl]


def refusal(impl: str, problem: Problem) -> str | None:
    """Return why a named implementation can't serve the problem, or None."""
    return _BY_NAME[impl].refuse(problem)


def slower_than_peft(problem: Problem) -> str | None:
    """Return why PEFT's own operators serve a call faster than "auto" would, or None.

    Without a kernel on an accelerator the mask is drawn by torch's operators, thousands of them for
    a large x. A named implementation still serves.
    """
    if not problem.dropout or problem.device.type in ("cpu", "meta"):
        return None
    if torch.compiler.is_compiling():  # can't call a cached function
        return _without_kernel(problem)
    return _cached_without_kernel(problem, (launch.replaced(), machine.active()))


@cache
def _cached_without_kernel(problem: Problem, replaced: tuple[bool, bool]) -> str | None:
    return _without_kernel(problem)


def _without_kernel(problem: Problem) -> str | None:
    reasons = refusals(problem)
    if any(name not in reasons for name in ("triton", "cuda")):
        return None
    return f"dropout without a kernel (triton {reasons['triton']}; cuda {reasons['cuda']})"


def refusals(problem: Problem) -> dict[str, str]:
    """Return the reason of each implementation that refuses the problem."""
    reasons = {i.name: i.refuse(problem) for i in IMPLEMENTATIONS}
    return {name: reason for name, reason in reasons.items() if reason is not None}

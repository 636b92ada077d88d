"""The seam between launchers and whatever runs a kernel: GPU, interpreter or virtual machine."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from lora_kernels.impl import executor, gpu
from lora_kernels.impl.triton.compiled import CompiledKernels
from lora_kernels.impl.triton.kept import Kept
from lora_kernels.impl.triton.plan.config import Problem
from lora_kernels.impl.triton.plan.device import Device, of_gpu
from lora_kernels.impl.triton.plan.plan import Plan
from lora_kernels.impl.triton.plan.tuned import planned
from lora_kernels.impl.triton.workspace import Workspace

T = TypeVar("T")
_MOST_KINDS = 4096


class Options(NamedTuple):
    """How a kernel is compiled, beside its constants, and launched.

    together: how many programs must run at the same time for any to go on.
    """

    num_warps: int
    num_stages: int
    together: int = 1


class Executor(executor.Executor, Protocol):
    """Plans calls and runs their kernels on tensors of one kind of device.

    workspace: where launches find their flags.
    """

    workspace: Workspace

    def device(self, tensor: torch.Tensor) -> Device:
        """Return the properties to plan for."""
        ...

    def plan(self, problem: Problem, device: Device) -> Plan:
        """Return which tiles a call takes."""
        ...

    def programs(self, device: Device) -> int:
        """Return how many programs are of use: as many as run at the same time."""
        ...

    def prepared(self, kind: Hashable, make: Callable[[], T]) -> T:
        """Return what calls of a kind share: `make()`, or what it made for the one before."""
        ...

    def run(
        self, kernel: Any, grid: int, args: dict[str, Any], constants: dict[str, Any], how: Options
    ) -> None:
        """Run `grid` programs: every launch of the package passes here.

        Args:
            kernel: a Triton kernel.
            grid: number of programs.
            args: run-time arguments by name, in the kernel's order: tensors, descriptors, numbers,
                tuples of these, and None for what is absent.
            constants: the constexpr parameters by name, in the kernel's order.
            how: warps, stages, and how many programs must run together.
        """
        ...

    def add_product(self, out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add left right to a matrix by the library's GEMM, in place: every one passes here."""
        ...


def anew(kind: Hashable, make: Callable[[], T]) -> T:
    """Make what calls of a kind share at each call: for executors whose plans change."""
    return make()


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left right to a matrix in place, by torch: on a GPU by its library, cuBLAS."""
    out.addmm_(left, right)


_WHAT_TO_TRY = (
    "Programs wait for each other, at most half a minute. If this call fails again, try "
    "impl='eager'; with CUDA_LAUNCH_BLOCKING=1 the failing launch itself is named."
)


class Gpu:
    """Runs kernels by Triton's own launcher, on the current stream of the tensors' device.

    It keeps what it finds out: what calls of a kind share, and compiled kernels; no tensors but
    the workspace's.
    """

    impl = "triton"

    def __init__(self) -> None:
        self.workspace = Workspace()
        self._compiled = CompiledKernels()
        self._prepared = Kept(_MOST_KINDS)

    def prepared(self, kind: Hashable, make: Callable[[], T]) -> T:
        """Return what calls of a kind share, made once."""
        return self._prepared.find(kind, make)

    def plan(self, problem: Problem, device: Device) -> Plan:
        """Return the measured plan, or the cost model's."""
        return planned(problem, device)

    def device(self, tensor: torch.Tensor) -> Device:
        """Return the properties of the tensor's device, less what torch's carve-out spares."""
        return of_gpu(tensor.device.index, gpu.spared_multiprocessors())

    def programs(self, device: Device) -> int:
        """Return one program a multiprocessor: every legal configuration fits at least once."""
        return device.multiprocessors

    def run(
        self, kernel: Any, grid: int, args: dict[str, Any], constants: dict[str, Any], how: Options
    ) -> None:
        """Launch on the current stream, beside whatever runs there: no grid must be resident whole.

        Raises:
            RuntimeError: compilation or the driver fails; or a launch before has, by giving up a
                wait for instance, unless CUDA_LAUNCH_BLOCKING=1 makes each one tell by itself.
        """
        try:
            self._compiled.launch(
                kernel,
                grid,
                args,
                constants,
                num_warps=how.num_warps,
                num_stages=how.num_stages,
                enable_fp_fusion=True,  # Triton's own default is said to change
            )
        except Exception as error:
            raise RuntimeError(
                f"{kernel.__name__}: launch of {grid} programs of {32 * how.num_warps} threads "
                f"failed: {error}\n{_WHAT_TO_TRY}"
            ) from error

    add_product = staticmethod(add_product)


_GPU = Gpu()


def current() -> Executor:
    """Return the executor of this context, or the GPU's."""
    return executor.of("triton") or _GPU

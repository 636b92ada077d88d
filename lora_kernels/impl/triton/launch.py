"""The seam between launchers and whatever runs a kernel: GPU, interpreter or virtual machine."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from lora_kernels.impl import executor, gpu
from lora_kernels.impl.triton.plan.config import Problem
from lora_kernels.impl.triton.plan.device import Device, of_gpu
from lora_kernels.impl.triton.plan.plan import Plan
from lora_kernels.impl.triton.plan.tuned import planned
from lora_kernels.impl.triton.workspace import Workspace

T = TypeVar("T")
# Launches a grid of a kernel with run-time arguments.
Launcher = Callable[[int, dict[str, Any]], None]


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
        """Return what calls of a kind share: `make()`, or what that was for one before."""
        ...

    def launcher(self, kernel: Any, constants: dict[str, Any], how: Options) -> Launcher:
        """Return what runs a kernel for calls of a kind; as `run`, which has the rest."""
        ...

    def run(
        self, kernel: Any, grid: int, args: dict[str, Any], constants: dict[str, Any], how: Options
    ) -> None:
        """Run `grid` programs: every launch passes here, or a `launcher`.

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


class Forgetful:
    """Part of an executor that keeps nothing from call to call, since its plans may change."""

    def prepared(self, kind: Hashable, make: Callable[[], T]) -> T:  # noqa: ARG002  the protocol's
        """Make what calls of a kind share at each call."""
        return make()

    def launcher(self: Executor, kernel: Any, constants: dict[str, Any], how: Options) -> Launcher:
        """Return what hands each launch to `run`."""

        def launch(grid: int, args: dict[str, Any]) -> None:
            self.run(kernel, grid, args, constants, how)

        return launch


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left right to a matrix in place, by torch: on a GPU by its library, cuBLAS.

    A CPU's, in a GPU's stead, may read what lies between left's rows.
    """
    out.addmm_(left.contiguous() if left.is_cpu else left, right)


_MOST_KINDS = 4096


class Gpu:
    """Runs kernels by Triton's own launcher, on the current stream of the tensors' device.

    It keeps what calls of a kind share; beside the workspace no tensor is part of that.
    """

    impl = "triton"

    def __init__(self) -> None:
        self.workspace = Workspace()
        self._prepared: dict[Hashable, Any] = {}

    def prepared(self, kind: Hashable, make: Callable[[], T]) -> T:
        """Return what calls of a kind share, made once, or again after very many kinds."""
        found: T | None = self._prepared.get(kind)
        if found is None:
            if len(self._prepared) >= _MOST_KINDS:
                self._prepared.clear()
            found = self._prepared[kind] = make()
        return found

    def launcher(self, kernel: Any, constants: dict[str, Any], how: Options) -> Launcher:
        """Return what launches a kernel, in a fourth of the time from its second launch on."""
        from lora_kernels.impl.triton.direct import Launch  # Triton, which may be absent here

        return Launch(kernel, constants, how)

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
        """Launch by Triton; raises as a launcher does."""
        self.launcher(kernel, constants, how)(grid, args)

    add_product = staticmethod(add_product)


_GPU = Gpu()


def current() -> Executor:
    """Return the executor of this context, or the GPU's."""
    return executor.of("triton") or _GPU

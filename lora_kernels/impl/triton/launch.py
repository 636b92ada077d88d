"""The seam between launchers and whatever runs a kernel: GPU, interpreter or virtual machine."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import triton
from triton.compiler import CompiledKernel

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
    """Add left right to a matrix in place, by torch: on a GPU by its library, cuBLAS."""
    out.addmm_(left, right)


_WHAT_TO_TRY = (
    "Programs wait for each other, at most half a minute. If this call fails again, try "
    "impl='eager'; with CUDA_LAUNCH_BLOCKING=1 the failing launch itself is named."
)


class Launch:
    """Launches a kernel for calls of one kind, on the current stream, beside whatever runs there.

    No grid must be resident whole. Triton's own launch specialises every argument, and looks that
    and all options up as text: three quarters of its time (docs/facts/gpu.md). Arguments of one
    kind are special in the same way. So Triton launches what it hasn't compiled yet, and what hooks
    or debugging want to see; else what it compiled is run as its launch would.

    compiled: the kernel, from the first launch on.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], how: Options) -> None:
        self._kernel, self._constants, self._how = kernel, constants, how
        self._fixed = tuple(constants.values())
        self.compiled: Any = None

    def __call__(self, grid: int, args: dict[str, Any]) -> None:
        """Launch.

        Raises:
            RuntimeError: compilation or the driver fails; or a launch before has, by giving up a
                wait for instance, unless CUDA_LAUNCH_BLOCKING=1 makes each one tell by itself.
        """
        compiled = self.compiled
        try:
            if compiled is None or _is_watched():
                self._launch_by_triton(grid, args)
                return
            stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
            compiled.run(
                grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *args.values(), *self._fixed,
            )  # fmt: skip
        except Exception as error:
            raise RuntimeError(
                f"{self._kernel.__name__}: launch of {grid} programs of {32 * self._how.num_warps} "
                f"threads failed: {error}\n{_WHAT_TO_TRY}"
            ) from error

    def _launch_by_triton(self, grid: int, args: dict[str, Any]) -> None:
        compiled = self._kernel[(grid,)](
            **args,
            **self._constants,
            num_warps=self._how.num_warps,
            num_stages=self._how.num_stages,
            enable_fp_fusion=True,  # Triton's own default is said to change
        )
        # What is compiled in the background is no such thing yet.
        if isinstance(compiled, CompiledKernel) and not _is_watched():
            self.compiled = compiled


def _is_watched() -> bool:
    """Whether hooks are called at launches, or code is compiled otherwise than usual."""
    runtime = triton.knobs.runtime
    return bool(
        _calls(runtime.launch_enter_hook)
        or _calls(runtime.launch_exit_hook)
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or triton.knobs.compilation.instrumentation_mode
    )


def _calls(hook: Any) -> Any:
    """Return what a hook calls: a chain of Triton's has a list."""
    return getattr(hook, "calls", hook)


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
        """Launch by Triton; raises as `Launch` does."""
        Launch(kernel, constants, how)(grid, args)

    add_product = staticmethod(add_product)


_GPU = Gpu()


def current() -> Executor:
    """Return the executor of this context, or the GPU's."""
    return executor.of("triton") or _GPU

"""Launches on a GPU: by Triton the first time, then of what it compiled, directly."""

from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

from lora_kernels.impl.triton.launch import Options

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

"""Launches of what Triton has compiled, kept by all that decides it.

Triton's own launch specialises every argument, constants too, and looks the result and its options
up as text, at each launch: three quarters of its time (docs/facts/gpu.md). Here the same is asked
of the arguments by a key of tuples, and the compiled kernel is run as Triton's launch would.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.impl.triton.kept import Kept

_ALIGNMENT = 16  # that Triton asks of addresses, in bytes, and of whole numbers
_MOST_KERNELS = 1024


def specialised(value: Any) -> Any:
    """Return what compiled code depends on of a run-time argument, or more than that.

    None and 1 are compiled in. Of a tensor it is the dtype and whether the address is aligned, of
    a whole number whether it is a multiple of 16 and how many bits it takes, of a descriptor dtype
    and tile. Triton asks less of what a kernel excepts (`do_not_specialize`); there this
    distinguishes numbers that share a kernel.
    """
    kind = type(value)
    if kind is int:
        return 1 if value == 1 else (value % _ALIGNMENT == 0, _width(value))
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % _ALIGNMENT == 0
    if isinstance(value, tuple):
        return tuple(map(specialised, value))
    if kind is TensorDescriptor:
        return value.base.dtype, tuple(value.block_shape)
    return None if value is None else kind


def _width(number: int) -> int:
    """Return whether a number is Triton's i32, i64 or u64."""
    if -(1 << 31) <= number < 1 << 31:
        return 32
    return 64 if number < 1 << 63 else -64


class CompiledKernels:
    """Compiled kernels by kernel, device, constants, options and `specialised` arguments."""

    def __init__(self) -> None:
        self._kept = Kept(_MOST_KERNELS)

    def launch(
        self,
        kernel: Any,
        grid: int,
        args: dict[str, Any],
        constants: dict[str, Any],
        **options: Any,
    ) -> None:
        """Launch on the current device and stream.

        Triton itself launches what it hasn't compiled yet, what is no plain kernel of its, and all
        while hooks want to know of launches (a profiler's).
        """
        if not isinstance(kernel, JITFunction) or _is_watched():
            kernel[(grid,)](**args, **constants, **options)
            return
        device = torch.cuda.current_device()
        given, fixed = tuple(args.values()), tuple(constants.values())
        knobs = triton.knobs
        set_by_users = knobs.runtime.debug, knobs.compilation.instrumentation_mode
        key = kernel.fn, device, fixed, tuple(options.values()), set_by_users, specialised(given)
        compiled: Any = self._kept.get(key)
        if compiled is None:
            compiled = kernel[(grid,)](**args, **constants, **options)
            if type(compiled) is CompiledKernel:  # not where one is compiled in the background
                self._kept.keep(key, compiled)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(
            grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *given, *fixed,
        )  # fmt: skip


def _is_watched() -> bool:
    """Whether hooks are called at launches, or look into compilation."""
    runtime = triton.knobs.runtime
    return (
        _has_calls(runtime.launch_enter_hook)
        or _has_calls(runtime.launch_exit_hook)
        or getattr(runtime, "add_stages_inspection_hook", None) is not None
    )


def _has_calls(hook: Any) -> bool:
    """Whether a hook, Triton's chain of them or a function, calls anything."""
    return hook is not None and getattr(hook, "calls", True) != []

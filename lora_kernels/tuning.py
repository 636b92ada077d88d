"""`tune`: measure on this GPU which plans a model's layers take."""

from pathlib import Path

import torch
from torch import nn

from lora_kernels.impl.triton.plan.device import of_gpu
from lora_kernels.impl.triton.plan.tuned import path_of
from lora_kernels.impl.triton.support import absence
from lora_kernels.impl.triton.tools.layers import shapes_of_model


def tune(
    model: nn.Module, *, rows: int = 8192, most: int = 3, processes: int | None = None
) -> Path:
    """Time the plans of a model's adapted linear layers on the current GPU and keep the fastest.

    Later calls of such sizes take them, in this process and in others. Kernels are compiled ahead
    by several processes; what an interrupted run has found stays.

    Args:
        model: with LoRALinear or patched PEFT layers, on any device; it isn't run.
        rows: M, tokens of a batch; calls of the same power of two share plans.
        most: how many configurations of one launch are timed for each call, those that the cost
            model predicts to be fastest, beside the library plan.
        processes: that compile; None: as many as this process may use CPUs.

    Returns:
        The file, which holds plans of this GPU and version.

    Raises:
        ImportError: Triton is absent or too old.
        RuntimeError: no GPU of compute capability 8.0 or newer.
        TypeError: `model` is no module.
        ValueError: `rows`, `most` or `processes` below 1, or a model without such layers.

    Example:
        >>> lk.tune(nn.Linear(64, 64))
        Traceback (most recent call last):
        ValueError: model: expected adapted linear layers, got none in Linear
    """
    count = 1 if processes is None else processes
    for name, value in (("rows", rows), ("most", most), ("processes", count)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = shapes_of_model(model, rows)
    if not found:
        raise ValueError(
            f"model: expected adapted linear layers, got none in {type(model).__name__}"
        )
    reason = absence()
    if reason is not None:
        raise ImportError(f"tune: expected Triton, but {reason}")
    from lora_kernels.impl.triton.tools import record
    from lora_kernels.impl.triton.tools import tune as tool

    if not tool.has_gpu():
        raise RuntimeError(tool.NO_GPU)
    for (dtype, adapters), shapes in found.items():
        tool.main(shapes, record.Made(dtype, adapters, "cuda"), None, most, processes)
    return path_of(of_gpu(torch.cuda.current_device()))

"""The launches of a call, recorded instead of run: to compile, count and time them one by one."""

from functools import partial
from typing import Any, NamedTuple

import torch

from lora_kernels.impl.executor import using
from lora_kernels.impl.triton import linear
from lora_kernels.impl.triton.launch import Options
from lora_kernels.impl.triton.plan.config import Config, Problem, shrink_config
from lora_kernels.impl.triton.plan.device import Device
from lora_kernels.impl.triton.plan.plan import Plan


class Launch(NamedTuple):
    """One launch of a call, as an executor gets it."""

    kernel: Any
    grid: int
    args: dict[str, Any]
    constants: dict[str, Any]
    how: Options


class Recorder:
    """An executor that keeps launches instead of running them."""

    impl = "triton"

    def __init__(self, device: Device) -> None:
        self._device = device
        self.launches: list[Launch] = []

    def device(self, tensor: torch.Tensor) -> Device:  # noqa: ARG002  the protocol's
        """Return the GPU that is planned for."""
        return self._device

    def programs(self, device: Device) -> int:
        """Return one program a multiprocessor."""
        return device.multiprocessors

    def run(
        self, kernel: Any, grid: int, args: dict[str, Any], constants: dict[str, Any], how: Options
    ) -> None:
        """Keep the launch."""
        self.launches.append(Launch(kernel, grid, args, constants, how))


def launches(
    problem: Problem,
    config: Config,
    device: Device,
    dtype: torch.dtype = torch.bfloat16,
    memory: torch.device | str = "cpu",
    bias: bool = False,
) -> list[Launch]:
    """Return the launches of a layer's call with a configuration, on tensors of random numbers.

    Args:
        problem: sizes and mode; contiguous tensors.
        config: the configuration, legal or not.
        device: the GPU that is planned for.
        dtype: of x, W, A and B, of `problem.bits` bits.
        memory: where the tensors lie.
        bias: whether the layer has one; backward doesn't read it.
    """
    m, n, k, r = problem[:4]
    normal, empty = (partial(f, device=memory, dtype=dtype) for f in (torch.randn, torch.empty))
    x, w, a, b = normal(m, k), normal(n, k), normal(r, k), normal(n, r)
    seed = torch.tensor(0, device=memory) if problem.dropout else None
    operands = linear.Operands(w, a, b, seed, 1.5, 6554 if problem.dropout else 0)
    shrink = None if config.xa_columns else shrink_config(problem, device)
    chosen, recorder = Plan(config, shrink, 0.0, 0.0), Recorder(device)
    rows = normal(m, n) if problem.backward else x
    with using(recorder):
        if problem.backward:
            dxa = linear.new_dxa(rows, r, chosen) if problem.needs[0] or problem.needs[1] else None
            if shrink and dxa is not None:
                linear._shrink(rows, operands._replace(seed=None), b, dxa, chosen)
            shapes = {"dx": (m, k), "da": (r, k), "db": (n, r), "dbias": (n,)}
            wanted = zip(shapes.items(), problem.needs, strict=True)
            results = {name: empty(*shape) if need else None for (name, shape), need in wanted}
            linear._backward(rows, x, normal(m, r), operands, dxa, results, chosen)
        else:
            xa = linear.new_xa(x, r, config)
            if shrink:
                linear._shrink(rows, operands, a, xa, chosen)
            linear._forward(rows, operands, normal(n) if bias else None, empty(m, n), xa, chosen)
    return recorder.launches

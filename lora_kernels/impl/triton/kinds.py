"""Kinds of calls: what calls have in common that differ in M, addresses and numbers alone."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.impl import gpu
from lora_kernels.impl.triton.kernels.arguments import Mode
from lora_kernels.impl.triton.kernels.mask import PACKED_THRESHOLDS
from lora_kernels.impl.triton.launch import Executor
from lora_kernels.impl.triton.operands import Operands
from lora_kernels.impl.triton.plan.config import DESCRIPTOR_ALIGNMENT, problem_of
from lora_kernels.impl.triton.plan.plan import Plan, rounded
from lora_kernels.operands.call import Wanted


class Kind(NamedTuple):
    """What the launches of a kind are made of; it holds no tensor.

    mode: how kernels compute that draw D, if there is dropout. wanted: None forward.
    """

    n: int
    k: int
    r: int
    dtype: torch.dtype
    plan: Plan
    mode: Mode
    programs: int
    wanted: Wanted | None

    @property
    def plain_mode(self) -> Mode:
        """How kernels compute that draw nothing."""
        return self.mode._replace(DROPOUT=False, PACKED=False)


def key_of(rows: Tensor, operands: Operands, wanted: Wanted | None) -> tuple[Any, ...]:
    """Return all that `kind_of` depends on: M as plans round it, and torch's switches too."""
    (m, _), weight, dtype = rows.shape, operands.weight, rows.dtype
    return (
        rows.device, dtype, (m - 1).bit_length(), weight.shape, operands.a.shape[0],
        _lie(rows), _lie(weight), weight.stride(0), rows.stride(0),
        operands.seed is None, operands.threshold <= PACKED_THRESHOLDS.value, wanted,
        gpu.spared_multiprocessors(), dtype == torch.float32 and gpu.tf32_allowed(),
    )  # fmt: skip


def _lie(matrix: Tensor) -> tuple[int, int]:
    return matrix.data_ptr() % DESCRIPTOR_ALIGNMENT, matrix.stride(1)


def kind_of(rows: Tensor, operands: Operands, wanted: Wanted | None, executor: Executor) -> Kind:
    """Describe the kind of a call; rows are x, or with backward's `wanted` dy."""
    dropout = operands.seed is not None
    problem = rounded(problem_of(rows, operands.weight, operands.a, dropout, wanted))
    device = executor.device(rows)
    mode = operands.mode(problem.m, device.mma)
    plan = executor.plan(problem, device)
    return Kind(*operands.sizes, rows.dtype, plan, mode, executor.programs(device), wanted)

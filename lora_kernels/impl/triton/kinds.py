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
from lora_kernels.impl.triton.plan.plan import Plan, dora_plan, rounded
from lora_kernels.operands.call import Wanted


class Kind(NamedTuple):
    """What the launches of a kind are made of; it holds no tensor.

    mode: how kernels compute that draw D, if there is dropout. wanted: None forward.
    executor: whose launchers run them. blocksize: of codes decoded in the loop, or 0.
    """

    n: int
    k: int
    r: int
    blocksize: int
    dtype: torch.dtype
    plan: Plan
    mode: Mode
    programs: int
    wanted: Wanted | None
    executor: Executor

    @property
    def plain_mode(self) -> Mode:
        """How kernels compute that draw nothing."""
        return self.mode._replace(DROPOUT=False, PACKED=False)


def key_of(
    rows: Tensor, operands: Operands, wanted: tuple[bool, ...] | None, *others: Tensor | None
) -> tuple[Any, ...]:
    """Return all that a kind's plan and compiled kernels depend on.

    That is torch's switches too; of M, as plans round it; and how each tensor of the call lies:
    compiled code knows dtypes, strides and which addresses are multiples of 16. What launchers
    allocate lies alike within a kind. Of a quantised W the codes stand in `operands`, and the parts
    are among the others.
    """
    (m, _), dtype = rows.shape, rows.dtype
    weight, a, b, seed, scaling, threshold, _, _, form = operands
    return (
        rows.device, (m - 1).bit_length(), weight.shape, a.shape[0], wanted,
        threshold <= PACKED_THRESHOLDS.value, gpu.spared_multiprocessors(),
        dtype == torch.float32 and gpu.tf32_allowed(),
        lie(rows), lie(weight), lie(a), lie(b), lie(seed), lie(scaling),
        form, *map(lie, others),
    )  # fmt: skip


def lie(t: Any) -> tuple[torch.dtype, tuple[int, ...], int] | None:
    """Return how a tensor lies in memory, None of what is absent or a number."""
    if not isinstance(t, Tensor):
        return None
    return t.dtype, t.stride(), t.data_ptr() % DESCRIPTOR_ALIGNMENT


def kind_of(
    rows: Tensor,
    operands: Operands,
    wanted: Wanted | None,
    executor: Executor,
    planned: Plan | None = None,
    gain: bool = False,
) -> Kind:
    """Describe the kind of a call; rows are x, or with backward's `wanted` dy.

    planned: of a quantised W that is decoded in the loop.
    gain: whether the call is DoRA's.
    """
    dropout = operands.seed is not None
    problem = rounded(problem_of(rows, operands.weight, operands.a, dropout, wanted))
    problem, device = problem._replace(gain=gain), executor.device(rows)
    mode = operands.mode(problem.m, device.mma)
    plan = planned or executor.plan(problem, device)
    if gain:
        plan = dora_plan(plan, problem, device)
    programs = executor.programs(device)
    sizes, blocksize = operands.sizes, operands.blocksize
    return Kind(*sizes, blocksize, rows.dtype, plan, mode, programs, wanted, executor)

"""The launches of calls of groups."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.impl import gpu
from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.arguments import Mode, Rows, Stack
from lora_kernels.impl.triton.kernels.grouped_backward import grouped_backward_kernel
from lora_kernels.impl.triton.kernels.grouped_forward import grouped_forward_kernel
from lora_kernels.impl.triton.kernels.mask import PACKED_THRESHOLDS
from lora_kernels.impl.triton.launch import Executor, Options
from lora_kernels.impl.triton.operands import WIDE_COUNTERS, as_rows
from lora_kernels.impl.triton.plan.config import padded_rank, rank_step, sum_ranks
from lora_kernels.impl.triton.plan.grouped import GroupedProblem, grouped_config
from lora_kernels.operands.call import Gradients, Wanted
from lora_kernels.operands.dropout import LANES
from lora_kernels.operands.grouped import GroupedCall, Groups
from lora_kernels.operands.precision import ranged


class GroupedOperands(NamedTuple):
    """A GroupedCall as launches take it: W and A with adjacent elements in one dimension."""

    weight: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    groups: Groups
    seed: Tensor | None
    scaling: float | Tensor
    threshold: int
    sorted_rows: int
    tokens: int

    @property
    def by_columns(self) -> bool:
        """Whether W lies as [G, K, N]."""
        return self.weight.stride(2) != 1 and self.weight.shape[2] > 1

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All tensors of the call but for x and dy, None or a number in place of some."""
        return self.weight, self.a, self.b, self.bias, *self.groups, self.seed, self.scaling

    @property
    def numbers(self) -> tuple[Any, ...]:
        """What else kernels are compiled for."""
        return (
            self.threshold <= PACKED_THRESHOLDS.value,
            gpu.tf32_allowed(),
            gpu.spared_multiprocessors(),
        )

    def scalars(self) -> dict[str, Any]:
        """The numbers that change from call to call, as every kernel takes them."""
        number = 1.0 if isinstance(self.scaling, Tensor) else float(self.scaling)
        return {
            "count": self.sorted_rows, "tokens": self.tokens, "scaling": number,
            "threshold": self.threshold,
        }  # fmt: skip

    def call(self) -> arguments.Call:
        """The parameters as kernels take them."""
        w, a = self.weight.transpose(1, 2) if self.by_columns else self.weight, self.a
        scaling = None
        if isinstance(self.scaling, Tensor):
            scaling = Rows(self.scaling, self.scaling.stride(0) if self.scaling.ndim else 0)
        return arguments.Call(
            Stack(w, w.stride(0), w.stride(1)), Stack(a, a.stride(0), a.stride(1)),
            Stack(self.b, *self.b.stride()), None if self.bias is None else as_rows(self.bias),
            self.seed, scaling,
        )  # fmt: skip

    def mode(self, mma: str) -> Mode:
        """How every kernel computes."""
        dropout, dtype = self.seed is not None, self.weight.dtype
        packed = dropout and dtype != torch.float32 and mma != "mma"
        packed &= self.threshold <= PACKED_THRESHOLDS.value
        wide = self.sorted_rows * -(-self.weight.shape[2] // LANES) >= WIDE_COUNTERS
        by_tf32 = dtype == torch.float16 or (dtype == torch.float32 and gpu.tf32_allowed())
        return Mode(dropout, wide, packed, mma, "tf32" if by_tf32 else "ieee")


def operands_of(call: GroupedCall, dtype: torch.dtype | None = None) -> GroupedOperands:
    """Return a call's operands; W is copied only if neither its rows nor columns are adjacent.

    dtype: of dy. Backward reads all of an adapter's B for each row panel: of ranks that lie apart,
    as PEFT has them, it would read eight times the bytes, so they are copied in that dtype.
    """
    (a, b, scaling), (seed, threshold) = call.adapter, call.dropout or (None, 0)
    weight = call.weight
    if 1 not in weight.stride()[1:]:
        weight = weight.contiguous()
    if a.stride(2) != 1:
        a = a.contiguous()
    if dtype is not None and b.stride(2) != 1:
        b = b.new_empty(b.shape, dtype=dtype).copy_(b)
    bias = call.bias
    if bias is not None and bias.stride(1) != 1:
        bias = bias.contiguous()
    offsets, *others = call.groups
    groups = Groups(offsets.contiguous(), *(t if t is None else t.contiguous() for t in others))
    return GroupedOperands(
        weight, a, b, bias, groups, seed, scaling, threshold, call.sorted_rows, call.tokens
    )


class _Launches:
    """What the launches of either direction of a kind share."""

    def __init__(self, operands: GroupedOperands, like: Tensor, executor: Executor) -> None:
        device = executor.device(like)
        (weights, n, k), (adapters, r, _) = operands.weight.shape, operands.a.shape
        self.groups = operands.groups.offsets.shape[0]
        # Calls of one kind have counts up to this one.
        count = 1 << (operands.sorted_rows - 1).bit_length()
        self.mode = operands.mode(device.mma)
        bits, dropout = like.element_size() * 8, self.mode.DROPOUT
        problem = GroupedProblem(count, self.groups, n, k, r, bits, dropout)
        self.n, self.k, self.r, self.dtype = n, k, r, like.dtype
        self.weights, self.adapters = weights, adapters
        self.config = grouped_config(problem, device)
        self.programs = self.config.programs * executor.programs(device)
        self.workspace = executor.workspace
        self.by_columns = operands.by_columns

    def shape(self, block_n: int, block_k: int, ranks: int) -> arguments.GroupedShape:
        """Return what is compiled in."""
        config = self.config
        return arguments.GroupedShape(
            N=self.n, K=self.k, R=self.r, GROUPS=self.groups, PADDED=1 << self.groups.bit_length(),
            ADAPTERS=self.adapters, WEIGHTS=self.weights, BLOCK_M=config.block_m, BLOCK_N=block_n,
            BLOCK_K=block_k, BLOCK_R=padded_rank(self.r), RANK_STEP=rank_step(self.r, self.dtype),
            GROUP=config.group, BY_COLUMNS=self.by_columns, RANKS=ranks,
            BLOCK_C=config.sum_columns, BLOCK_S=config.sum_rows,
        )  # fmt: skip

    def panels(self, count: int) -> int:
        """Return how many numbers of row panels there are, as kernels reserve them."""
        return count // self.config.block_m + self.groups + 1


class Forward(_Launches):
    """The launch of forward calls of one kind."""

    def __init__(self, x: Tensor, operands: GroupedOperands, executor: Executor) -> None:
        super().__init__(operands, x, executor)
        config = self.config
        self._columns = -(-self.n // config.block_n)
        constants = {"SHAPE": self.shape(config.block_n, config.block_k, 0), "MODE": self.mode}
        how = Options(config.num_warps, config.num_stages)
        self._launch = executor.launcher(grouped_forward_kernel, constants, how)

    def __call__(self, x: Tensor, operands: GroupedOperands, y: Tensor, xa: Tensor) -> None:
        """Store y [S, N] and xa [S, R]."""
        panels = self.panels(operands.sorted_rows)
        args = {
            "x": as_rows(x), "call": operands.call(), "groups": operands.groups,
            "out": arguments.Outputs(y, xa, None, None),
            "flags": self.workspace.zeros(panels + 1, x.device), **operands.scalars(),
        }  # fmt: skip
        self._launch(min(panels * self._columns, self.programs), args)


class Backward(_Launches):
    """The launch of backward calls of one kind."""

    def __init__(
        self, dy: Tensor, operands: GroupedOperands, executor: Executor, wanted: Wanted
    ) -> None:
        super().__init__(operands, dy, executor)
        config, ranks = self.config, sum_ranks(self.r)
        slabs = padded_rank(self.r) // ranks
        n_blocks, k_blocks = (-(-size // config.sum_columns) for size in (self.n, self.k))
        self._fused = wanted.dx or wanted.da
        columns = -(-self.k // config.block_n) if wanted.dx else 1
        self._panel_tiles = columns * self._fused
        self._sum_tiles = slabs * self.adapters * (n_blocks * wanted.db + k_blocks * wanted.da)
        self._sum_tiles += self.weights * n_blocks * wanted.dbias
        shape = self.shape(config.block_k, config.block_n, ranks)
        how = Options(config.num_warps, config.num_stages)
        constants = {"SHAPE": shape, "MODE": self.mode}
        self._launch = executor.launcher(grouped_backward_kernel, constants, how)

    def __call__(
        self, dy: Tensor, x: Tensor | None, xa: Tensor | None, operands: GroupedOperands,
        out: Gradients,
    ) -> None:  # fmt: skip
        """Store the gradients that are not None in `out`; dx's rows are sorted."""
        panels, dxa = self.panels(operands.sorted_rows), None
        if self._fused:
            dxa = dy.new_empty(operands.sorted_rows, self.r, dtype=ranged(dy.dtype))
        args = {
            "dy": as_rows(dy), "x": None if x is None else as_rows(x), "xa": xa,
            "call": operands.call(), "groups": operands.groups, "dxa": dxa, "out": out,
            "flags": self.workspace.zeros(panels + 1, dy.device), **operands.scalars(),
        }  # fmt: skip
        self._launch(min(panels * self._panel_tiles + self._sum_tiles, self.programs), args)

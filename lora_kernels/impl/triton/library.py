"""The launches of the library plan: passes for the low-rank part, and the library's GEMM.

    forward     xa = D(x) Aᵀ;  y = bias + scaling · xa Bᵀ;  then the GEMM adds x Wᵀ
    backward    a pass over dy: dxa, dB, dbias;  a pass over x: dA, dx = D(dxa A);  then the GEMM
                adds dy W

No launch waits for another's programs.
"""

import torch
from torch import Tensor

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.arguments import Factor
from lora_kernels.impl.triton.kernels.dy_pass import dy_pass_kernel
from lora_kernels.impl.triton.kernels.expand import expand_kernel
from lora_kernels.impl.triton.kernels.x_pass import x_pass_kernel
from lora_kernels.impl.triton.kinds import Kind
from lora_kernels.impl.triton.launch import Options
from lora_kernels.impl.triton.operands import Operands, as_rows, floats
from lora_kernels.impl.triton.plan.config import (
    LibraryConfig,
    padded_rank,
    rank_step,
    sum_ranks,
)
from lora_kernels.impl.triton.shrink import Shrink, shrink_shape
from lora_kernels.operands.call import Gradients
from lora_kernels.operands.precision import ranged


class Forward:
    """The launches of forward calls of one kind."""

    def __init__(self, kind: Kind) -> None:
        assert kind.plan.shrink is not None
        self._executor = kind.executor
        self._shrink, self._expand = Shrink(kind, kind.plan.shrink), Expand(kind)

    def __call__(self, x: Tensor, operands: Operands, bias: Tensor | None, y: Tensor) -> Tensor:
        """Store y [M, N] and return xa."""
        xa = x.new_empty(x.shape[0], operands.sizes[2])
        self._shrink(x, operands, Factor(xa, None))
        self._expand(xa, operands, bias, y)
        self._executor.add_product(y, x, operands.weight.t())
        return xa


class Backward:
    """The launches of backward calls of one kind."""

    def __init__(self, kind: Kind) -> None:
        self._executor = kind.executor
        self._dy_pass, self._x_pass = DyPass(kind), XPass(kind)
        # float16's range is short: the pass over x rounds it in units.
        self._dtype = ranged(kind.dtype)

    def __call__(
        self, dy: Tensor, x: Tensor | None, xa: Tensor | None, operands: Operands, out: Gradients
    ) -> None:
        """Store the gradients that are not None in `out`."""
        dxa = None
        if out.dx is not None or out.da is not None:
            dxa = dy.new_empty(dy.shape[0], operands.sizes[2], dtype=self._dtype)
        if dxa is not None or out.db is not None or out.dbias is not None:
            self._dy_pass(dy, xa, operands, dxa, out)
        if dxa is not None:
            self._x_pass(x, dxa, operands, out)
        if out.dx is not None:
            self._executor.add_product(out.dx, dy, operands.weight)


class Expand:
    """The launch of y = bias + scaling · xa Bᵀ."""

    def __init__(self, kind: Kind) -> None:
        config = _config(kind)
        self._rows, self._columns = config.block_m, -(-kind.n // config.block_n)
        shape = arguments.ExpandShape(
            N=kind.n, R=kind.r, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_R=padded_rank(kind.r), RANK_STEP=rank_step(kind.r, kind.dtype),
        )  # fmt: skip
        constants = {"SHAPE": shape, "MODE": kind.plain_mode}
        how = Options(config.expand_warps, 1)
        self._launch = kind.executor.launcher(expand_kernel, constants, how)

    def __call__(
        self,
        xa: Tensor,
        operands: Operands,
        bias: Tensor | None,
        y: Tensor,
        u: Tensor | None = None,
    ) -> None:
        """Store y, and in u the same without the bias."""
        m = y.shape[0]
        args = {
            "xa": xa, "b": as_rows(operands.b), "bias": bias,
            "scaling_pointer": operands.scaling_pointer, "y": y, "u": u,
            **operands.scalars(m),
        }  # fmt: skip
        del args["threshold"]
        grid = -(-m // self._rows) * self._columns
        self._launch(grid, args)


class DyPass:
    """The launch of dxa, dB and dbias."""

    def __init__(self, kind: Kind) -> None:
        config, shrink, wanted, self._plan = _config(kind), kind.plan.shrink, kind.wanted, kind.plan
        assert shrink is not None
        assert wanted is not None
        ranks = sum_ranks(kind.r)
        blocks = -(-kind.n // config.sum_columns) * (padded_rank(kind.r) // ranks)
        self._blocks = blocks * (wanted.db or wanted.dbias)
        self._space = Space(kind, self._blocks, (ranks + 1) * config.sum_columns)
        self._panel = shrink.block_m
        shape = arguments.PassShape(
            N=kind.n, K=0, R=kind.r, BLOCK_R=padded_rank(kind.r), RANKS=ranks,
            BLOCK_C=config.sum_columns, BLOCK_S=config.sum_rows,
        )  # fmt: skip
        constants = {
            "SHRINK": shrink_shape(kind, shrink), "SHAPE": shape, "MODE": kind.plain_mode,
        }  # fmt: skip
        how = Options(config.sum_warps, shrink.num_stages)
        self._launch = kind.executor.launcher(dy_pass_kernel, constants, how)

    def __call__(
        self, dy: Tensor, xa: Tensor | None, operands: Operands, dxa: Tensor | None, out: Gradients
    ) -> None:
        m, segment = dy.shape[0], self._plan.segment_of(dy.shape[0])
        parts = -(-m // segment)
        args = {
            "dy": as_rows(dy), "xa": xa, "b": as_rows(operands.b),
            "scaling_pointer": operands.scaling_pointer,
            "dxa": Factor(dxa, None), "out": Gradients(None, None, out.db, out.dbias),
            "shared": self._space.of(dy, parts),
            **operands.scalars(m), "segment": segment,
        }  # fmt: skip
        grid = parts * (self._blocks + segment // self._panel * (dxa is not None))
        self._launch(grid, args)


class XPass:
    """The launch of dA and dx = D(dxa A); with `base` D of the sum with what dx holds."""

    def __init__(self, kind: Kind, base: bool = False) -> None:
        config, wanted, self._plan = _config(kind), kind.wanted, kind.plan
        assert wanted is not None
        ranks, self._blocks = padded_rank(kind.r), -(-kind.k // config.pass_columns)
        self._space = Space(kind, self._blocks, (ranks + 1) * config.pass_columns * wanted.da)
        shape = arguments.PassShape(
            N=kind.n, K=kind.k, R=kind.r, BLOCK_R=ranks, RANKS=ranks,
            BLOCK_C=config.pass_columns, BLOCK_S=config.sum_rows, BASE=base,
        )  # fmt: skip
        constants = {"SHAPE": shape, "MODE": kind.mode}
        how = Options(config.pass_warps, config.pass_stages)
        self._launch = kind.executor.launcher(x_pass_kernel, constants, how)

    def __call__(self, x: Tensor | None, dxa: Tensor, operands: Operands, out: Gradients) -> None:
        m, segment = dxa.shape[0], self._plan.segment_of(dxa.shape[0])
        parts = -(-m // segment)
        args = {
            "x": None if x is None else as_rows(x), "dxa": dxa, "a": as_rows(operands.a),
            "seed_pointer": operands.seed, "out": Gradients(out.dx, out.da, None, None),
            "shared": self._space.of(dxa, parts),
            **operands.scalars(m), "segment": segment,
        }  # fmt: skip
        del args["scaling"]
        self._launch(parts * self._blocks, args)


class Space:
    """What sums in parts need: a counter a block, and room for each part's floats."""

    def __init__(self, kind: Kind, blocks: int, room: int) -> None:
        self._workspace, self._counters = kind.executor.workspace, max(blocks, 1)
        self._room = blocks * room

    def of(self, like: Tensor, parts: int) -> arguments.Shared:
        """Return it, on a tensor's device."""
        counters = self._workspace.zeros(self._counters, like.device)
        space = parts * self._room if parts > 1 else 0
        partials = floats(like, space) if space else counters.view(torch.float32)
        return arguments.Shared(None, counters, partials, None)


def _config(kind: Kind) -> LibraryConfig:
    assert isinstance(kind.plan.config, LibraryConfig)
    return kind.plan.config

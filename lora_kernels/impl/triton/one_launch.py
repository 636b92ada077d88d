"""The launches of a call whose products are all Triton's: one, or two where xa has its own."""

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.arguments import Factor, Gain
from lora_kernels.impl.triton.kernels.backward import backward_kernel
from lora_kernels.impl.triton.kernels.forward import forward_kernel
from lora_kernels.impl.triton.kinds import Kind
from lora_kernels.impl.triton.launch import Options
from lora_kernels.impl.triton.operands import Operands, as_rows, floats, unit_rows
from lora_kernels.impl.triton.plan.config import (
    Config,
    padded_rank,
    rank_step,
    sum_ranks,
)
from lora_kernels.impl.triton.shrink import Shrink
from lora_kernels.operands.call import Gradients

_MASK_COLUMNS = 256  # the widest tile of dx or dA: rows of the mask's bits hold whole tiles


def new_xa(x: Tensor, r: int, config: Config) -> Tensor:
    """Return an uninitialised xa [M, R], in memory for the rows of whole tiles."""
    m = x.shape[0]
    panels = -(-m // config.block_m)
    xa = x.new_empty(panels * config.block_m, r)
    return xa if m == panels * config.block_m else xa.resize_(m, r)


class Forward:
    """The launches of forward calls of one kind.

    norm: of DoRA, the tile that makes the norm of rows of W, as the shape has it.
    """

    def __init__(self, kind: Kind, norm: dict[str, Any] | None = None) -> None:
        self._config, self._workspace = _config(kind), kind.executor.workspace
        config = self._config
        self._programs, self._columns = kind.programs, -(-kind.n // config.block_n)
        shrink = kind.plan.shrink
        self._shrink = None if shrink is None else Shrink(kind, shrink)
        shape = arguments.ForwardShape(
            N=kind.n, K=kind.k, R=kind.r, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, BLOCK_R=padded_rank(kind.r),
            RANK_STEP=rank_step(kind.r, kind.dtype), GROUP=config.group,
            XA_COLUMNS=config.xa_columns, BLOCKSIZE=kind.blocksize, **(norm or {}),
        )  # fmt: skip
        self._norms = -(-kind.n // shape.NORM_ROWS) if norm else 0
        constants = {"SHAPE": shape, "MODE": kind.mode}
        how = Options(config.num_warps, config.num_stages, max(config.xa_columns, 1))
        self._launch = kind.executor.launcher(forward_kernel, constants, how)

    def __call__(
        self,
        x: Tensor,
        operands: Operands,
        bias: Tensor | None,
        y: Tensor,
        dora: tuple[Tensor, Gain] | None = None,
    ) -> Tensor:
        """Store y [M, N] and return xa; dora: u [M, N] and n, to be stored, too, and magnitude."""
        u, gain = dora or (None, None)
        config, w, m = self._config, unit_rows(operands.weight), x.shape[0]
        xa = new_xa(x, operands.sizes[2], config)
        if self._shrink is not None:
            self._shrink(x, operands, Factor(xa, None))
        panels = -(-m // config.block_m)
        args = {
            "x": as_rows(x), "x_descriptor": _descriptor(x, config.block_m, config),
            "call": operands.call(w, bias, gain),
            "w_descriptor": _descriptor(w, config.block_n, config),
            "out": arguments.Outputs(y, xa, *_room_for_parts(xa, panels, config), u),
            "flags": self._workspace.zeros(panels + 2, x.device), **operands.scalars(m),
        }  # fmt: skip
        grid = min(panels * self._columns + self._norms, self._programs)
        self._launch(grid, args)
        return xa


def _config(kind: Kind) -> Config:
    assert isinstance(kind.plan.config, Config)
    return kind.plan.config


def _room_for_parts(xa: Tensor, panels: int, config: Config) -> tuple[Tensor | None, Tensor | None]:
    """Return where parts of xa are left: words of 32 bits for two sums, and what is left.

    The words lie in xa's own memory where each row panel's fit its part of that. float32 sums are
    left as xa itself.
    """
    if config.xa_columns < 2 or xa.element_size() == 4:
        return None, None
    r = xa.shape[1]
    size = panels * config.block_m * padded_rank(r)
    whole = xa.as_strided((size,), (1,)) if r == padded_rank(r) else xa.new_empty(size)
    # Four bits beside a bfloat16, eight beside a float16.
    left = size // (8 if xa.dtype == torch.bfloat16 else 4)
    return whole.view(torch.int32), xa.new_empty(left, dtype=torch.int32)


class Backward:
    """The launches of backward calls of one kind."""

    def __init__(self, kind: Kind) -> None:
        self._config, self._plan, self._programs = _config(kind), kind.plan, kind.programs
        self._workspace = kind.executor.workspace
        config, wanted = self._config, kind.wanted
        assert wanted is not None
        shrinks, shrink = wanted.dx or wanted.da, kind.plan.shrink
        self._shrink = Shrink(kind, shrink) if shrinks and shrink is not None else None
        self._fused = config.xa_columns > 0 and shrinks
        self._ranks = sum_ranks(kind.r)
        # float32's products outweigh a second drawing, and need the registers.
        shared_mask = kind.mode.DROPOUT and kind.dtype.itemsize == 2 and wanted.dx and wanted.da
        stride = -(-kind.k // _MASK_COLUMNS) * _MASK_COLUMNS // 32
        self._mask_stride = stride if shared_mask else 0
        # Rows that share a unit of float16's dxa: a row panel's of the launch that makes it.
        rows = config.block_m if self._shrink is None else self._shrink.rows
        self._unit_rows = rows if shrinks and kind.dtype == torch.float16 else 0
        # A step of dA's sums has one unit.
        self._sum_rows = min(config.sum_rows, self._unit_rows or config.sum_rows)
        slabs = padded_rank(kind.r) // self._ranks
        self._blocks = [-(-size // config.sum_columns) * slabs for size in (kind.n, kind.k)]
        # Tiles of a row panel, and of a segment.
        columns = -(-kind.k // config.block_n)
        self._tiles = self._fused + (columns - self._fused) * wanted.dx
        self._sums = self._blocks[0] * (wanted.db or wanted.dbias) + self._blocks[1] * wanted.da
        shape = arguments.BackwardShape(
            N=kind.n, K=kind.k, R=kind.r, BLOCK_M=config.block_m, BLOCK_N=config.block_k,
            BLOCK_K=config.block_n, BLOCK_R=padded_rank(kind.r),
            RANK_STEP=rank_step(kind.r, kind.dtype), GROUP=config.group, FUSED=self._fused,
            RANKS=self._ranks, BLOCK_C=config.sum_columns, BLOCK_S=self._sum_rows,
            UNIT_ROWS=self._unit_rows or 1, MASK_STRIDE=stride,
            BLOCKSIZE=kind.blocksize,
        )  # fmt: skip
        constants = {"SHAPE": shape, "MODE": kind.mode}
        how = Options(config.num_warps, config.num_stages)
        self._launch = kind.executor.launcher(backward_kernel, constants, how)

    def __call__(
        self, dy: Tensor, x: Tensor | None, xa: Tensor | None, operands: Operands, out: Gradients
    ) -> None:
        """Store the gradients that are not None in `out`."""
        config, w, m = self._config, unit_rows(operands.weight), dy.shape[0]
        dxa = Factor(None, None)
        if out.dx is not None or out.da is not None:
            dxa = self._new_dxa(dy, operands.sizes[2])
        if self._shrink is not None:
            self._shrink(dy, operands, dxa)
        panels, segment = -(-m // config.block_m), self._plan.segment_of(m)
        parts = -(-m // segment)
        args = {
            "dy": as_rows(dy), "dy_descriptor": _descriptor(dy, config.block_m, config),
            "x": None if x is None else as_rows(x), "xa": xa, "call": operands.call(w),
            "w_descriptor": _descriptor(w, config.block_k, config, columns=config.block_n),
            "dxa": dxa, "out": out, "shared": self._shared(dy, panels, parts),
            **operands.scalars(m), "segment": segment,
        }  # fmt: skip
        grid = min(panels * self._tiles + parts * self._sums, self._programs)
        self._launch(grid, args)

    def _new_dxa(self, dy: Tensor, r: int) -> Factor:
        """Return an uninitialised dxa, with units for the row panels that make it."""
        m, rows = dy.shape[0], self._unit_rows
        return Factor(dy.new_empty(m, r), floats(dy, -(-m // rows)) if rows else None)

    def _shared(self, dy: Tensor, panels: int, parts: int) -> arguments.Shared:
        """Return what programs tell each other by."""
        blocks, mask = sum(self._blocks), None
        counters = self._workspace.zeros(blocks + panels + 1, dy.device)
        space = blocks * parts * (self._ranks + 1) * self._config.sum_columns if parts > 1 else 0
        partials = floats(dy, space) if space else counters.view(torch.float32)
        if self._mask_stride:
            rows = max(dy.shape[0], self._sum_rows)
            mask = dy.new_empty(rows, self._mask_stride, dtype=torch.int32)
        return arguments.Shared(counters[blocks:], counters, partials, mask)


class Tiles(TensorDescriptor):
    """A descriptor that isn't checked once more: only `aligned` problems have one.

    Triton's own checks take as long as making and encoding it.
    """

    def __post_init__(self) -> None:
        pass


def _descriptor(
    t: Tensor, rows: int, config: Config, columns: int | None = None
) -> TensorDescriptor | None:
    """Return what copies tiles of so many rows, by steps of block_k or by `columns`, or None.

    Codes, decoded in the loop, aren't copied so: in W's place is its shape alone, on "meta".
    """
    if not config.descriptors or t.is_meta:
        return None
    return Tiles(t, t.shape, t.stride(), [rows, columns or config.block_k])

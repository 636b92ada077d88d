"""The launchers: from tensors to plans, grids and arguments. Same signatures as `reference`."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.impl import gpu
from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.arguments import Factor, Mode, Rows
from lora_kernels.impl.triton.kernels.backward import backward_kernel
from lora_kernels.impl.triton.kernels.forward import forward_kernel
from lora_kernels.impl.triton.kernels.mask import PACKED_THRESHOLDS
from lora_kernels.impl.triton.kernels.shrink import shrink_kernel
from lora_kernels.impl.triton.launch import Options, current
from lora_kernels.impl.triton.plan.config import (
    Config,
    padded_rank,
    problem_of,
    rank_step,
    sum_ranks,
)
from lora_kernels.impl.triton.plan.plan import Plan
from lora_kernels.operands.call import Gradients, LinearCall, Wanted
from lora_kernels.operands.dropout import LANES

_MASK_COLUMNS = 256  # the widest tile of dx or dA: rows of the mask's bits hold whole tiles
_SHRINK_PROGRAMS = 4  # a multiprocessor: few enough to be resident, enough to stream by
_WIDE_COUNTERS = 1 << 32  # of the mask, one for eight elements: from here on they need 64 bits


class Operands(NamedTuple):
    """A LinearCall as kernels take it: adjacent elements along rows, dropout's two numbers."""

    weight: Tensor
    a: Tensor
    b: Tensor
    seed: Tensor | None
    scaling: float | Tensor
    threshold: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, K and R."""
        return self.weight.shape[0], self.weight.shape[1], self.a.shape[0]

    def scalars(self, m: int) -> dict[str, Any]:
        """The numbers that change from call to call, as every kernel takes them."""
        number = 1.0 if isinstance(self.scaling, Tensor) else float(self.scaling)
        return {"m": m, "scaling": number, "threshold": self.threshold}

    @property
    def scaling_pointer(self) -> Tensor | None:
        """The scaling where it is in memory."""
        return self.scaling if isinstance(self.scaling, Tensor) else None

    def call(self, bias: Tensor | None = None) -> arguments.Call:
        """The call's parameters as kernels take them."""
        w, a, b = map(_rows, (self.weight, self.a, self.b))
        return arguments.Call(w, a, b, bias, self.seed, self.scaling_pointer)

    def mode(self, m: int, mma: str) -> Mode:
        """How every kernel computes."""
        dropout = self.seed is not None
        # float32's sums lack a register for it.
        packed = dropout and self.weight.element_size() == 2
        packed &= mma != "mma" and self.threshold <= PACKED_THRESHOLDS.value
        wide = m * -(-self.weight.shape[1] // LANES) >= _WIDE_COUNTERS
        return Mode(dropout, wide, packed, mma, _precision(self.weight.dtype))


class Dxa(NamedTuple):
    """dxa [M, R], of float16 in units, float32, one for each `rows` rows: its range is short."""

    numbers: Tensor
    units: Tensor | None
    rows: int


def forward(x: Tensor, call: LinearCall) -> tuple[Tensor, Tensor]:
    """Return y [..., N] and xa [M, R]; see `reference`.

    Precision: products accumulate in float32 (IEEE, or TF32 for float32 inputs where torch's
    switch allows it); A, B and scaling · B are rounded to x's dtype on load (of float16, whose sums
    are scaled instead, A and B), xa and y once. Parts of xa that one column of tiles leaves to the
    next are rounded to 12 significant bits (bfloat16; 16 for float16, none for float32), four to
    five more than xa keeps.
    """
    operands = _operands(call)
    rows = _unit_rows(_as_matrix(x))
    m, (n, _, r) = rows.shape[0], operands.sizes
    y = x.new_empty(*x.shape[:-1], n)
    if m == 0:
        return y, x.new_empty(m, r)
    problem = problem_of(rows, *operands[:2], call.dropout is not None)
    executor = current()
    chosen = executor.plan(problem, executor.device(x))
    xa = new_xa(rows, r, chosen.config)
    with _on_device(x):
        if chosen.shrink is not None:
            _shrink(rows, operands._replace(scaling=1.0), operands.a, xa, chosen)
        _forward(rows, operands, call.bias, y.view(m, n), xa, chosen)
    return y, xa


def new_xa(x: Tensor, r: int, config: Config) -> Tensor:
    """Return an uninitialised xa [M, R], in memory for the rows of whole tiles."""
    m = x.shape[0]
    return x.new_empty(-(-m // config.block_m) * config.block_m, r).resize_(m, r)


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


def backward(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: LinearCall, wanted: Wanted
) -> Gradients:
    """Return dx, dA, dB, dbias; see `reference`.

    Precision: all sums in float32, in an order that doesn't depend on timing; dxa is rounded once
    to dy's dtype (float16: in a unit of its row panel, so that nothing vanishes or overflows),
    results once to their parameters' dtypes.
    """
    operands, (lora_A, lora_B, _) = _operands(call), call.adapter
    rows = _unit_rows(_as_matrix(dy))
    x2 = _unit_rows(_as_matrix(x)) if wanted.da and x is not None else None
    m, (n, k, r) = rows.shape[0], operands.sizes
    dx = dy.new_empty(*dy.shape[:-1], k) if wanted.dx else None
    out = Gradients(
        dx if dx is None else dx.view(m, k),
        lora_A.new_empty(r, k) if wanted.da else None,
        lora_B.new_empty(n, r) if wanted.db else None,
        dy.new_empty(n) if wanted.dbias else None,
    )
    if m == 0:
        for t in out:
            if t is not None:
                t.zero_()
    elif any(wanted):
        problem = problem_of(rows, *operands[:2], call.dropout is not None, wanted)
        executor = current()
        chosen = executor.plan(problem, executor.device(dy))
        with _on_device(dy):
            dxa = new_dxa(rows, r, chosen) if wanted.dx or wanted.da else None
            if chosen.shrink is not None and dxa is not None:
                bare = operands._replace(seed=None)  # no mask; its factor goes with dxa
                _shrink(rows, bare, operands.b, dxa, chosen)
            _backward(rows, x2, xa, operands, dxa, out, chosen)
    return out._replace(dx=dx)


def new_dxa(dy: Tensor, r: int, chosen: Plan) -> Dxa:
    """Return an uninitialised dxa with units for the row panels that make it."""
    m, rows = dy.shape[0], (chosen.shrink or chosen.config).block_m
    units = _floats(dy, -(-m // rows)) if dy.dtype == torch.float16 else None
    return Dxa(dy.new_empty(m, r), units, rows)


def _shrink(v: Tensor, operands: Operands, factor: Tensor, out: Tensor | Dxa, chosen: Plan) -> None:
    """Launch xa = scaling · D(v) fᵀ or, into a `Dxa`, dxa = scaling · D(v) f."""
    config, (m, length), executor = chosen.shrink, v.shape, current()
    assert config is not None
    device = executor.device(v)
    grid = min(-(-m // config.block_m), _SHRINK_PROGRAMS * executor.programs(device))
    transposed = isinstance(out, Tensor)
    numbers, units = (out, None) if isinstance(out, Tensor) else out[:2]
    args = {
        "v": _rows(v), "f": _rows(factor), "seed_pointer": operands.seed,
        "scaling_pointer": operands.scaling_pointer, "out": Factor(numbers, units),
        **operands.scalars(m),
    }  # fmt: skip
    r = operands.sizes[2]
    shape = arguments.ShrinkShape(
        L=length, R=r, TRANSPOSED=transposed, BLOCK_M=config.block_m, BLOCK_L=config.block_k,
        BLOCK_R=padded_rank(r),
    )  # fmt: skip
    constants = {"SHAPE": shape, "MODE": operands.mode(m, device.mma)}
    executor.run(shrink_kernel, grid, args, constants, Options(config.num_warps, config.num_stages))


def _forward(
    x: Tensor, operands: Operands, bias: Tensor | None, y: Tensor, xa: Tensor, chosen: Plan
) -> None:
    """Launch the forward kernel; xa is read, not written, on the split path."""
    config, w, (m, k), n = chosen.config, operands.weight, x.shape, y.shape[1]
    panels, executor = -(-m // config.block_m), current()
    device = executor.device(x)
    grid = min(panels * -(-n // config.block_n), executor.programs(device))
    high, low = _room_for_parts(xa, panels, config)
    args = {
        "x": _rows(x), "x_descriptor": _descriptor(x, config.block_m, config),
        "call": operands.call(bias), "w_descriptor": _descriptor(w, config.block_n, config),
        "out": arguments.Outputs(y, xa, high, low),
        "flags": executor.workspace.zeros(panels + 1, x.device), **operands.scalars(m),
    }  # fmt: skip
    r = operands.sizes[2]
    shape = arguments.ForwardShape(
        N=n, K=k, R=r, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=padded_rank(r), RANK_STEP=rank_step(r, x.dtype), GROUP=config.group,
        XA_COLUMNS=config.xa_columns,
    )  # fmt: skip
    constants = {"SHAPE": shape, "MODE": operands.mode(m, device.mma)}
    how = Options(config.num_warps, config.num_stages, max(config.xa_columns, 1))
    executor.run(forward_kernel, grid, args, constants, how)


def _backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    operands: Operands,
    dxa: Dxa | None,
    out: Gradients,
    chosen: Plan,
) -> None:
    """Launch the backward kernel; dxa is read, not written, on the split path."""
    config, w, m, (n, k, r) = chosen.config, operands.weight, dy.shape[0], operands.sizes
    executor = current()
    device = executor.device(dy)
    fused = config.xa_columns > 0 and dxa is not None
    panels, segment = -(-m // config.block_m), chosen.segment_of(m)
    parts, ranks = -(-m // segment), sum_ranks(r)
    blocks = [-(-size // config.sum_columns) * (padded_rank(r) // ranks) for size in (n, k)]
    tiles = panels * fused
    tiles += panels * (-(-k // config.block_n) - fused) * (out.dx is not None)
    tiles += parts * blocks[0] * (out.db is not None or out.dbias is not None)
    tiles += parts * blocks[1] * (out.da is not None)
    space = sum(blocks) * parts * (ranks + 1) * config.sum_columns if parts > 1 else 0
    # float32's products outweigh a second drawing, and need the registers.
    shared_mask = operands.seed is not None and dy.element_size() == 2
    shared_mask &= out.dx is not None and out.da is not None
    numbers, units, unit_rows = dxa or (None, None, 1)
    # A step of dA's sums has one unit.
    sum_rows = config.sum_rows if units is None else min(config.sum_rows, unit_rows)
    mask_size = max(m, sum_rows), -(-k // _MASK_COLUMNS) * _MASK_COLUMNS // 32
    counters = executor.workspace.zeros(sum(blocks) + panels + 1, dy.device)
    shared = arguments.Shared(
        counters[sum(blocks) :], counters,
        _floats(dy, space) if space else counters.view(torch.float32),
        dy.new_empty(mask_size, dtype=torch.int32) if shared_mask else None,
    )  # fmt: skip
    args = {
        "dy": _rows(dy), "dy_descriptor": _descriptor(dy, config.block_m, config),
        "x": None if x is None else _rows(x), "xa": xa, "call": operands.call(),
        "w_descriptor": _descriptor(w, config.block_k, config, columns=config.block_n),
        "dxa": Factor(numbers, units), "out": out, "shared": shared, **operands.scalars(m),
        "segment": segment,
    }  # fmt: skip
    shape = arguments.BackwardShape(
        N=n, K=k, R=r, BLOCK_M=config.block_m, BLOCK_N=config.block_k, BLOCK_K=config.block_n,
        BLOCK_R=padded_rank(r), RANK_STEP=rank_step(r, dy.dtype), GROUP=config.group, FUSED=fused,
        RANKS=ranks, BLOCK_C=config.sum_columns, BLOCK_S=sum_rows,
        UNIT_ROWS=1 if units is None else unit_rows, MASK_STRIDE=mask_size[1],
    )  # fmt: skip
    constants = {"SHAPE": shape, "MODE": operands.mode(m, device.mma)}
    how = Options(config.num_warps, config.num_stages)
    executor.run(backward_kernel, min(tiles, executor.programs(device)), args, constants, how)


def _operands(call: LinearCall) -> Operands:
    (a, b, scaling), (seed, threshold) = call.adapter, call.dropout or (None, 0)
    weight = _unit_rows(call.weight.decode())
    return Operands(weight, _unit_rows(a), _unit_rows(b), seed, scaling, threshold)


def _floats(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.float32)


def _descriptor(
    t: Tensor, rows: int, config: Config, columns: int | None = None
) -> TensorDescriptor | None:
    """Return what copies tiles of so many rows, by steps of block_k or by `columns`, or None."""
    if not config.descriptors:
        return None
    return TensorDescriptor.from_tensor(t, [rows, columns or config.block_k])


def _rows(matrix: Tensor) -> Rows:
    return Rows(matrix, matrix.stride(0))


def _as_matrix(v: Tensor) -> Tensor:
    return v if v.ndim == 2 else v.reshape(-1, v.shape[-1])


def _unit_rows(t: Tensor) -> Tensor:
    """Return a matrix whose elements along a row are adjacent: itself, or a copy."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """Return how float32 products are formed, as torch's own switch says."""
    return "tf32" if dtype == torch.float32 and gpu.tf32_allowed() else "ieee"


def _on_device(t: Tensor) -> Any:
    """Make the tensor's GPU the current one: Triton launches there."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else nullcontext()

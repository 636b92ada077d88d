"""The launches of a call whose products are all Triton's: one, or two where xa has its own."""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.arguments import Factor
from lora_kernels.impl.triton.kernels.backward import backward_kernel
from lora_kernels.impl.triton.kernels.forward import forward_kernel
from lora_kernels.impl.triton.launch import Options, current
from lora_kernels.impl.triton.operands import Operands, as_rows, floats, unit_rows
from lora_kernels.impl.triton.plan.config import (
    Config,
    padded_rank,
    rank_step,
    sum_ranks,
)
from lora_kernels.impl.triton.plan.plan import Plan
from lora_kernels.impl.triton.shrink import Dxa, shrink
from lora_kernels.operands.call import Gradients

_MASK_COLUMNS = 256  # the widest tile of dx or dA: rows of the mask's bits hold whole tiles


def new_xa(x: Tensor, r: int, config: Config) -> Tensor:
    """Return an uninitialised xa [M, R], in memory for the rows of whole tiles."""
    m = x.shape[0]
    return x.new_empty(-(-m // config.block_m) * config.block_m, r).resize_(m, r)


def forward(x: Tensor, operands: Operands, bias: Tensor | None, y: Tensor, chosen: Plan) -> Tensor:
    """Store y [M, N] and return xa."""
    config = _config(chosen)
    operands = operands._replace(weight=unit_rows(operands.weight))
    xa = new_xa(x, operands.sizes[2], config)
    if chosen.shrink is not None:
        shrink(x, operands._replace(scaling=1.0), operands.a, xa, chosen.shrink)
    _forward(x, operands, bias, y, xa, config)
    return xa


def backward(
    dy: Tensor,
    x: Tensor | None,
    xa: Tensor | None,
    operands: Operands,
    out: Gradients,
    chosen: Plan,
) -> None:
    """Store the gradients that are not None in `out`."""
    operands = operands._replace(weight=unit_rows(operands.weight))
    wanted = out.dx is not None or out.da is not None
    dxa = new_dxa(dy, operands.sizes[2], chosen) if wanted else None
    if chosen.shrink is not None and dxa is not None:
        # No mask; its factor goes with dxa.
        shrink(dy, operands._replace(seed=None), operands.b, dxa, chosen.shrink)
    _backward(dy, x, xa, operands, dxa, out, chosen)


def new_dxa(dy: Tensor, r: int, chosen: Plan) -> Dxa:
    """Return an uninitialised dxa with units for the row panels that make it."""
    m, rows = dy.shape[0], (chosen.shrink or _config(chosen)).block_m
    units = floats(dy, -(-m // rows)) if dy.dtype == torch.float16 else None
    return Dxa(dy.new_empty(m, r), units, rows)


def _config(chosen: Plan) -> Config:
    assert isinstance(chosen.config, Config)
    return chosen.config


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


def _forward(
    x: Tensor, operands: Operands, bias: Tensor | None, y: Tensor, xa: Tensor, config: Config
) -> None:
    """Launch the forward kernel; xa is read, not written, on the split path."""
    w, (m, k), n = operands.weight, x.shape, y.shape[1]
    panels, executor = -(-m // config.block_m), current()
    device = executor.device(x)
    grid = min(panels * -(-n // config.block_n), executor.programs(device))
    high, low = _room_for_parts(xa, panels, config)
    args = {
        "x": as_rows(x), "x_descriptor": _descriptor(x, config.block_m, config),
        "call": operands.call(bias), "w_descriptor": _descriptor(w, config.block_n, config),
        "out": arguments.Outputs(y, xa, high, low),
        "flags": executor.workspace.zeros(panels + 1, x.device), **operands.scalars(m),
    }  # fmt: skip
    r = operands.sizes[2]
    shape = arguments.ForwardShape(
        N=n, K=k, R=r, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=padded_rank(r), RANK_STEP=rank_step(r, x.dtype), GROUP=config.group,
        XA_COLUMNS=config.xa_columns, BLOCKSIZE=operands.blocksize,
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
    config, w, m, (n, k, r) = _config(chosen), operands.weight, dy.shape[0], operands.sizes
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
        floats(dy, space) if space else counters.view(torch.float32),
        dy.new_empty(mask_size, dtype=torch.int32) if shared_mask else None,
    )  # fmt: skip
    args = {
        "dy": as_rows(dy), "dy_descriptor": _descriptor(dy, config.block_m, config),
        "x": None if x is None else as_rows(x), "xa": xa, "call": operands.call(),
        "w_descriptor": _descriptor(w, config.block_k, config, columns=config.block_n),
        "dxa": Factor(numbers, units), "out": out, "shared": shared, **operands.scalars(m),
        "segment": segment,
    }  # fmt: skip
    shape = arguments.BackwardShape(
        N=n, K=k, R=r, BLOCK_M=config.block_m, BLOCK_N=config.block_k, BLOCK_K=config.block_n,
        BLOCK_R=padded_rank(r), RANK_STEP=rank_step(r, dy.dtype), GROUP=config.group, FUSED=fused,
        RANKS=ranks, BLOCK_C=config.sum_columns, BLOCK_S=sum_rows,
        UNIT_ROWS=1 if units is None else unit_rows, MASK_STRIDE=mask_size[1],
        BLOCKSIZE=operands.blocksize,
    )  # fmt: skip
    constants = {"SHAPE": shape, "MODE": operands.mode(m, device.mma)}
    how = Options(config.num_warps, config.num_stages)
    executor.run(backward_kernel, min(tiles, executor.programs(device)), args, constants, how)


def _descriptor(
    t: Tensor, rows: int, config: Config, columns: int | None = None
) -> TensorDescriptor | None:
    """Return what copies tiles of so many rows, by steps of block_k or by `columns`, or None.

    Codes, decoded in the loop, aren't copied so: in W's place is its shape alone, on "meta".
    """
    if not config.descriptors or t.is_meta:
        return None
    return TensorDescriptor.from_tensor(t, [rows, columns or config.block_k])

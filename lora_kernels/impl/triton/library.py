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
from lora_kernels.impl.triton.launch import Options, current
from lora_kernels.impl.triton.operands import Operands, as_rows, floats
from lora_kernels.impl.triton.plan.config import (
    LibraryConfig,
    padded_rank,
    rank_step,
    sum_ranks,
)
from lora_kernels.impl.triton.plan.plan import Plan
from lora_kernels.impl.triton.shrink import shrink, shrink_shape
from lora_kernels.operands.call import Gradients


def forward(x: Tensor, operands: Operands, bias: Tensor | None, y: Tensor, chosen: Plan) -> Tensor:
    """Store y [M, N] and return xa."""
    assert chosen.shrink is not None
    xa = x.new_empty(x.shape[0], operands.sizes[2])
    shrink(x, operands._replace(scaling=1.0), operands.a, xa, chosen.shrink)
    _expand(xa, operands, bias, y, _config(chosen))
    current().add_product(y, x, operands.weight.t())
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
    dxa = None
    if out.dx is not None or out.da is not None:
        # float16's range is short: the pass over x rounds it in units.
        dtype = torch.float32 if dy.dtype == torch.float16 else dy.dtype
        dxa = dy.new_empty(dy.shape[0], operands.sizes[2], dtype=dtype)
    if dxa is not None or out.db is not None or out.dbias is not None:
        _dy_pass(dy, xa, operands, dxa, out, chosen)
    if dxa is not None:
        _x_pass(x, dxa, operands, out, chosen)
    if out.dx is not None:
        current().add_product(out.dx, dy, operands.weight)


def _expand(
    xa: Tensor, operands: Operands, bias: Tensor | None, y: Tensor, config: LibraryConfig
) -> None:
    """Launch y = bias + scaling · xa Bᵀ."""
    (m, n), executor, r = y.shape, current(), operands.sizes[2]
    args = {
        "xa": xa, "b": as_rows(operands.b), "bias": bias,
        "scaling_pointer": operands.scaling_pointer, "y": y,
        **operands.scalars(m),
    }  # fmt: skip
    del args["threshold"]
    shape = arguments.ExpandShape(
        N=n, R=r, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=padded_rank(r),
        RANK_STEP=rank_step(r, y.dtype),
    )  # fmt: skip
    mode = operands._replace(seed=None).mode(m, executor.device(y).mma)
    grid = -(-m // config.block_m) * -(-n // config.block_n)
    how = Options(config.expand_warps, 1)
    executor.run(expand_kernel, grid, args, {"SHAPE": shape, "MODE": mode}, how)


def _dy_pass(
    dy: Tensor,
    xa: Tensor | None,
    operands: Operands,
    dxa: Tensor | None,
    out: Gradients,
    chosen: Plan,
) -> None:
    """Launch dxa, dB and dbias."""
    m, (n, _, r), config, executor = dy.shape[0], operands.sizes, _config(chosen), current()
    assert chosen.shrink is not None
    segment, ranks = chosen.segment_of(m), sum_ranks(r)
    parts, sums = -(-m // segment), out.db is not None or out.dbias is not None
    blocks = -(-n // config.sum_columns) * (padded_rank(r) // ranks) * sums
    args = {
        "dy": as_rows(dy), "xa": xa, "b": as_rows(operands.b),
        "scaling_pointer": operands.scaling_pointer,
        "dxa": Factor(dxa, None), "out": out._replace(dx=None, da=None),
        "shared": _shared(dy, blocks, parts, (ranks + 1) * config.sum_columns),
        **operands.scalars(m), "segment": segment,
    }  # fmt: skip
    shape = arguments.PassShape(
        N=n,
        K=0,
        R=r,
        BLOCK_R=padded_rank(r),
        RANKS=ranks,
        BLOCK_C=config.sum_columns,
        BLOCK_S=config.sum_rows,
    )
    constants = {
        "SHRINK": shrink_shape(n, r, chosen.shrink, transposed=False), "SHAPE": shape,
        "MODE": operands._replace(seed=None).mode(m, executor.device(dy).mma),
    }  # fmt: skip
    grid = parts * (blocks + segment // chosen.shrink.block_m * (dxa is not None))
    how = Options(config.sum_warps, chosen.shrink.num_stages)
    executor.run(dy_pass_kernel, grid, args, constants, how)


def _x_pass(
    x: Tensor | None, dxa: Tensor, operands: Operands, out: Gradients, chosen: Plan
) -> None:
    """Launch dA and dx = D(dxa A)."""
    m, (n, k, r), config, executor = dxa.shape[0], operands.sizes, _config(chosen), current()
    segment, ranks = chosen.segment_of(m), padded_rank(r)
    parts, blocks = -(-m // segment), -(-k // config.pass_columns)
    room = (ranks + 1) * config.pass_columns
    args = {
        "x": None if x is None else as_rows(x), "dxa": dxa, "a": as_rows(operands.a),
        "seed_pointer": operands.seed, "out": out._replace(db=None, dbias=None),
        "shared": _shared(dxa, blocks, parts, room if out.da is not None else 0),
        **operands.scalars(m), "segment": segment,
    }  # fmt: skip
    del args["scaling"]
    shape = arguments.PassShape(
        N=n,
        K=k,
        R=r,
        BLOCK_R=ranks,
        RANKS=ranks,
        BLOCK_C=config.pass_columns,
        BLOCK_S=config.sum_rows,
    )
    constants = {"SHAPE": shape, "MODE": operands.mode(m, executor.device(dxa).mma)}
    how = Options(config.pass_warps, config.pass_stages)
    executor.run(x_pass_kernel, parts * blocks, args, constants, how)


def _shared(like: Tensor, blocks: int, parts: int, room: int) -> arguments.Shared:
    """Return counters of blocks that are summed in parts, and room for the parts' floats."""
    counters = current().workspace.zeros(max(blocks, 1), like.device)
    space = blocks * parts * room if parts > 1 else 0
    partials = floats(like, space) if space else counters.view(torch.float32)
    return arguments.Shared(None, counters, partials, None)


def _config(chosen: Plan) -> LibraryConfig:
    assert isinstance(chosen.config, LibraryConfig)
    return chosen.config

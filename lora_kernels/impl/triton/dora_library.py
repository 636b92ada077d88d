"""The launches of a DoRA call by the library plan: its norm, its passes, the library's GEMMs.

    forward     n;  xa;  u = scaling · xa Bᵀ;  the GEMM adds x Wᵀ;  y = g ⊙ u + bias
    dropout     n;  xa and D(x);  y = u = scaling · xa Bᵀ;  GEMMs add x Wᵀ to y, D(x) Wᵀ to u;
                y = y + (g - 1) ⊙ u + bias
    backward    a pass over dy: dz = g ⊙ dy, dmagnitude, dbias;  then as the linear layer's of dz
    dropout     the first pass leaves dw = (g - 1) ⊙ dy, too;  dxa and dB of dz;  dx = dw W by the
                GEMM;  a pass over x: dA, dx = D(dx + dxa A);  then the GEMM adds dy W

No launch waits for another's programs.
"""

import torch
from torch import Tensor

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.arguments import Factor, Gain
from lora_kernels.impl.triton.kernels.gain import dz_pass_kernel, rescale_kernel
from lora_kernels.impl.triton.kernels.norm import norm_kernel
from lora_kernels.impl.triton.kinds import Kind
from lora_kernels.impl.triton.launch import Options
from lora_kernels.impl.triton.library import DyPass, Expand, Space, XPass
from lora_kernels.impl.triton.operands import Operands, as_rows, floats, unit_rows
from lora_kernels.impl.triton.plan.config import padded_rank, rank_step, sum_ranks
from lora_kernels.impl.triton.shrink import Shrink
from lora_kernels.operands.call import Gradients
from lora_kernels.operands.dora import DoraGradients, Kept

_NORM_ROWS, _NORM_WARPS, _NORM_STAGES = 16, 4, 2
_PASS_COLUMNS, _PASS_ROWS, _PASS_WARPS = 128, 32, 4  # of y and dy, where elements are multiplied


class Norm:
    """The launch of n = ‖W + scaling · B A‖ of each row."""

    def __init__(self, kind: Kind) -> None:
        self._grid = -(-kind.n // _NORM_ROWS)
        ranks, plain = padded_rank(kind.r), kind.dtype == torch.float32
        shape = arguments.NormShape(
            N=kind.n, K=kind.k, R=kind.r, BLOCK_N=_NORM_ROWS, BLOCK_K=64 if plain else 128,
            BLOCK_R=ranks, RANKS=sum_ranks(kind.r), RANKS_32=rank_step(kind.r, torch.float32),
        )  # fmt: skip
        # TF32 would leave a thousandth of B A, of which little more may be left beside W.
        constants = {"SHAPE": shape, "MODE": kind.plain_mode._replace(PRECISION="ieee")}
        how = Options(_NORM_WARPS, _NORM_STAGES)
        self._launch = kind.executor.launcher(norm_kernel, constants, how)

    def __call__(self, operands: Operands) -> Tensor:
        """Return n [N], float32."""
        norm = floats(operands.weight, operands.sizes[0])
        args = {
            "w": as_rows(unit_rows(operands.weight)), "a": as_rows(operands.a),
            "b": as_rows(operands.b), "scaling_pointer": operands.scaling_pointer, "norm": norm,
            "scaling": operands.scalars(0)["scaling"],
        }  # fmt: skip
        self._launch(self._grid, args)
        return norm


class Forward:
    """The launches of forward calls of one kind."""

    def __init__(self, kind: Kind) -> None:
        assert kind.plan.shrink is not None
        self._executor, self._drops = kind.executor, kind.mode.DROPOUT
        self._norm, self._rescale = Norm(kind), _Rescale(kind)
        self._shrink, self._expand = Shrink(kind, kind.plan.shrink), Expand(kind)

    def __call__(
        self, x: Tensor, operands: Operands, bias: Tensor | None, magnitude: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Store y [M, N] and return xa, u and n."""
        norm, weight = self._norm(operands), operands.weight.t()
        xa, u = x.new_empty(x.shape[0], operands.sizes[2]), torch.empty_like(y)
        kept = x.new_empty(x.shape) if self._drops else None
        self._shrink(x, operands, Factor(xa, None), kept)
        self._expand(xa, operands, None, u, None if kept is None else y)
        self._executor.add_product(u, x if kept is None else kept, weight)
        if kept is not None:
            self._executor.add_product(y, x, weight)
        self._rescale(u, Gain(magnitude, norm), bias, y)
        return xa, u, norm


class _Rescale:
    """The launch of y = g ⊙ u + bias, or with dropout of y + (g - 1) ⊙ u + bias."""

    def __init__(self, kind: Kind) -> None:
        self._columns = -(-kind.n // _PASS_COLUMNS)
        shape = arguments.ExpandShape(
            N=kind.n, R=kind.r, BLOCK_M=_PASS_ROWS, BLOCK_N=_PASS_COLUMNS, BLOCK_R=0, RANK_STEP=0
        )
        constants = {"SHAPE": shape, "BASE": kind.mode.DROPOUT}
        how = Options(_PASS_WARPS, 1)
        self._launch = kind.executor.launcher(rescale_kernel, constants, how)

    def __call__(self, u: Tensor, gain: Gain, bias: Tensor | None, y: Tensor) -> None:
        m = y.shape[0]
        args = {"u": u, "gain": gain, "bias": bias, "y": y, "m": m}
        self._launch(-(-m // _PASS_ROWS) * self._columns, args)


class Backward:
    """The launches of backward calls of one kind."""

    def __init__(self, kind: Kind) -> None:
        wanted = kind.wanted
        assert wanted is not None
        self._executor, self._drops = kind.executor, kind.mode.DROPOUT and wanted.dx
        self._dz_pass, self._dy_pass = _DzPass(kind), DyPass(kind)
        self._x_pass = XPass(kind, base=self._drops)
        # float16's range is short: the pass over x rounds it in units.
        self._dtype = torch.float32 if kind.dtype == torch.float16 else kind.dtype

    def __call__(
        self, dy: Tensor, kept: Kept, operands: Operands, magnitude: Tensor, out: DoraGradients
    ) -> None:
        """Store the gradients that are not None in `out`; kept.x is read for dA only."""
        (dx, da, db, _, _), m = out, dy.shape[0]
        shrinks = dx is not None or da is not None
        dz = torch.empty_like(dy, memory_format=torch.contiguous_format)
        dw = torch.empty_like(dz) if self._drops else None
        made = arguments.DzOutputs(dz if shrinks or db is not None else None, dw, out.dm, out.dbias)
        self._dz_pass(dy, kept.u, Gain(magnitude, kept.norm), operands.threshold, made)
        dxa = dy.new_empty(m, operands.sizes[2], dtype=self._dtype) if shrinks else None
        products = Gradients(dx, da, db, None)
        if shrinks or db is not None:
            self._dy_pass(dz, kept.xa, operands, dxa, products)
        if dw is not None and dx is not None:
            self._executor.add_product(dx.zero_(), dw, operands.weight)
        if dxa is not None:
            self._x_pass(kept.x, dxa, operands, products)
        if dx is not None:
            self._executor.add_product(dx, dz if dw is None else dy, operands.weight)


class _DzPass:
    """The launch of dz, dw, dmagnitude and dbias."""

    def __init__(self, kind: Kind) -> None:
        self._plan, self._blocks = kind.plan, -(-kind.n // _PASS_COLUMNS)
        self._space = Space(kind, self._blocks, 2 * _PASS_COLUMNS)
        shape = arguments.PassShape(
            N=kind.n, K=0, R=1, BLOCK_R=1, RANKS=1, BLOCK_C=_PASS_COLUMNS, BLOCK_S=_PASS_ROWS
        )
        how = Options(_PASS_WARPS, 1)
        self._launch = kind.executor.launcher(dz_pass_kernel, {"SHAPE": shape}, how)

    def __call__(
        self,
        dy: Tensor,
        u: Tensor | None,
        gain: Gain,
        threshold: int,
        out: arguments.DzOutputs,
    ) -> None:
        m, segment = dy.shape[0], self._plan.segment_of(dy.shape[0])
        parts = -(-m // segment)
        args = {
            "dy": as_rows(dy), "u": None if out.dm is None or u is None else as_rows(u),
            "gain": gain, "out": out, "shared": self._space.of(dy, parts), "m": m,
            "threshold": threshold, "segment": segment,
        }  # fmt: skip
        self._launch(parts * self._blocks, args)

"""The launches that DoRA adds to any plan: the norm of rows, and what is multiplied by g alone."""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.arguments import Gain
from lora_kernels.impl.triton.kernels.gain import dz_pass_kernel, rescale_kernel
from lora_kernels.impl.triton.kernels.norm import norm_kernel
from lora_kernels.impl.triton.kinds import Kind
from lora_kernels.impl.triton.launch import Options
from lora_kernels.impl.triton.library import Space
from lora_kernels.impl.triton.operands import Operands, as_rows, floats, unit_rows
from lora_kernels.impl.triton.plan.config import padded_rank, sum_ranks

_NORM_ROWS, _NORM_WARPS = 32, 4
_PASS_COLUMNS, _PASS_ROWS, _PASS_WARPS = 128, 32, 4  # of y and dy, where elements are multiplied
# Rows that one program of the dz pass sums, and the most parts that its last one adds.
_SEGMENT, _PARTS = 256, 64


def norm_tile(kind: Kind, columns: int) -> dict[str, Any]:
    """Return the tile of the norm, as shapes have it: rows of W, columns a step, ranks a product.

    As many rows as let all multiprocessors take part of most layers.
    """
    return {
        "NORM_ROWS": _NORM_ROWS, "NORM_COLUMNS": columns, "NORM_RANKS": sum_ranks(kind.r),
    }  # fmt: skip


class Norm:
    """The launch of n = ‖W + scaling · B A‖ of each row."""

    def __init__(self, kind: Kind) -> None:
        self._grid = -(-kind.n // _NORM_ROWS)
        sizes = {"N": kind.n, "K": kind.k, "R": kind.r, "BLOCK_R": padded_rank(kind.r)}
        shape = arguments.NormShape(
            **sizes, **norm_tile(kind, 64 if kind.dtype == torch.float32 else 128)
        )
        # TF32 would leave a thousandth of B A, of which little more may be left beside W.
        constants = {"SHAPE": shape, "MODE": kind.plain_mode._replace(PRECISION="ieee")}
        how = Options(_NORM_WARPS, 1)
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


class Rescale:
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
        """Store y."""
        m = y.shape[0]
        args = {"u": u, "gain": gain, "bias": bias, "y": y, "m": m}
        self._launch(-(-m // _PASS_ROWS) * self._columns, args)


class DzPass:
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
        """Store what is not None of `out`."""
        m = dy.shape[0]
        segment = min(self._plan.segment_of(m), max(_SEGMENT, -(-m // _PARTS)))
        parts = -(-m // segment)
        args = {
            "dy": as_rows(dy), "u": None if out.dm is None or u is None else as_rows(u),
            "gain": gain, "out": out, "shared": self._space.of(dy, parts), "m": m,
            "threshold": threshold, "segment": segment,
        }  # fmt: skip
        self._launch(parts * self._blocks, args)

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

from lora_kernels.impl.triton.dora_passes import DzPass, Norm, Rescale
from lora_kernels.impl.triton.kernels.arguments import DzOutputs, Factor, Gain
from lora_kernels.impl.triton.kinds import Kind
from lora_kernels.impl.triton.library import DyPass, Expand, XPass
from lora_kernels.impl.triton.operands import Operands
from lora_kernels.impl.triton.shrink import Shrink
from lora_kernels.operands.call import Gradients
from lora_kernels.operands.dora import DoraGradients, Kept
from lora_kernels.operands.precision import ranged


class Forward:
    """The launches of forward calls of one kind."""

    def __init__(self, kind: Kind) -> None:
        assert kind.plan.shrink is not None
        self._executor, self._drops = kind.executor, kind.mode.DROPOUT
        self._norm, self._rescale = Norm(kind), Rescale(kind)
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


class Backward:
    """The launches of backward calls of one kind."""

    def __init__(self, kind: Kind) -> None:
        wanted = kind.wanted
        assert wanted is not None
        self._executor, self._drops = kind.executor, kind.mode.DROPOUT and wanted.dx
        self._dz_pass, self._dy_pass = DzPass(kind), DyPass(kind)
        self._x_pass = XPass(kind, base=self._drops)
        # float16's range is short: the pass over x rounds it in units.
        self._dtype = ranged(kind.dtype)

    def __call__(
        self, dy: Tensor, kept: Kept, operands: Operands, magnitude: Tensor, out: DoraGradients
    ) -> None:
        """Store the gradients that are not None in `out`; kept.x is read for dA only."""
        (dx, da, db, _, _), m = out, dy.shape[0]
        shrinks = dx is not None or da is not None
        dz = dy.new_empty(dy.shape)
        dw = torch.empty_like(dz) if self._drops else None
        made = DzOutputs(dz if shrinks or db is not None else None, dw, out.dm, out.dbias)
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

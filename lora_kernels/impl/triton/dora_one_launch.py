"""The launches of a DoRA call without dropout whose large product is Triton's own.

forward     the linear layer's launch, whose first tiles make n, and which stores u and
            y = g ⊙ u + bias
backward    a pass over dy: dz = g ⊙ dy, dmagnitude, dbias;  then the linear layer's launch of dz
"""

import torch
from torch import Tensor

from lora_kernels.impl.triton import one_launch
from lora_kernels.impl.triton.dora_passes import DzPass, norm_tile
from lora_kernels.impl.triton.kernels.arguments import DzOutputs, Gain
from lora_kernels.impl.triton.kinds import Kind
from lora_kernels.impl.triton.operands import Operands, floats
from lora_kernels.impl.triton.plan.config import MIN_TILE, Config, padded_rank
from lora_kernels.operands.call import Gradients
from lora_kernels.operands.dora import DoraGradients, Kept


def _norm_columns(warps: int, r: int) -> int:
    """Return the columns of a step of the norm: its sums leave registers to the products.

    Of 32 columns and 16 ranks ptxas keeps sm_90's two warps at 168 registers, and spills 8 bytes.
    """
    return 128 if warps == 2 and padded_rank(r) == MIN_TILE else 16 * warps


class Forward:
    """The launches of forward calls of one kind."""

    def __init__(self, kind: Kind) -> None:
        assert isinstance(kind.plan.config, Config)
        columns = _norm_columns(kind.plan.config.num_warps, kind.r)
        self._launch = one_launch.Forward(kind, norm_tile(kind, columns))

    def __call__(
        self, x: Tensor, operands: Operands, bias: Tensor | None, magnitude: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Store y [M, N] and return xa, u and n."""
        norm, u = floats(x, operands.sizes[0]), torch.empty_like(y)
        return self._launch(x, operands, bias, y, (u, Gain(magnitude, norm))), u, norm


class Backward:
    """The launches of backward calls of one kind."""

    def __init__(self, kind: Kind) -> None:
        self._dz_pass, self._launch = DzPass(kind), one_launch.Backward(kind)

    def __call__(
        self, dy: Tensor, kept: Kept, operands: Operands, magnitude: Tensor, out: DoraGradients
    ) -> None:
        """Store the gradients that are not None in `out`; kept.x is read for dA only."""
        products = Gradients(out.dx, out.da, out.db, None)
        used = any(t is not None for t in products)
        dz = dy.new_empty(dy.shape) if used else None
        made = DzOutputs(dz, None, out.dm, out.dbias)
        self._dz_pass(dy, kept.u, Gain(magnitude, kept.norm), operands.threshold, made)
        if dz is not None:
            self._launch(dz, kept.x, kept.xa, operands, products)

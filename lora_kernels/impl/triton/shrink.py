"""The launch of a shrink by itself, of the split path and of the library plan."""

from torch import Tensor

from lora_kernels.impl.triton.kernels.arguments import Factor, ShrinkShape
from lora_kernels.impl.triton.kernels.shrink import shrink_kernel
from lora_kernels.impl.triton.kinds import Kind
from lora_kernels.impl.triton.launch import Options
from lora_kernels.impl.triton.operands import Operands, as_rows
from lora_kernels.impl.triton.plan.config import ShrinkConfig, padded_rank

_PROGRAMS = 4  # a multiprocessor: few enough to be resident, enough to stream by


class Shrink:
    """The launch of a kind's xa = D(x) Aᵀ or, backward, of its dxa = scaling · keep scale · dy B.

    dxa's has no mask, but the factor of kept elements.
    """

    def __init__(self, kind: Kind, config: ShrinkConfig) -> None:
        self.rows, self._most = config.block_m, _PROGRAMS * kind.programs
        self._forward = kind.wanted is None
        constants = {
            "SHAPE": shrink_shape(kind, config),
            "MODE": kind.mode if self._forward else kind.plain_mode,
        }
        how = Options(config.num_warps, config.num_stages)
        self._launch = kind.executor.launcher(shrink_kernel, constants, how)

    def __call__(
        self, v: Tensor, operands: Operands, out: Factor, kept: Tensor | None = None
    ) -> None:
        """Launch it, of x or dy; `kept` takes D(x)."""
        m = v.shape[0]
        if self._forward:
            factor, seed, pointer = operands.a, operands.seed, None
            scalars = {**operands.scalars(m), "scaling": 1.0}
        else:
            factor, seed, pointer = operands.b, None, operands.scaling_pointer
            scalars = operands.scalars(m)
        args = {
            "v": as_rows(v), "f": as_rows(factor), "seed_pointer": seed,
            "scaling_pointer": pointer, "out": out, "kept": kept, **scalars,
        }  # fmt: skip
        self._launch(min(-(-m // self.rows), self._most), args)


def shrink_shape(kind: Kind, config: ShrinkConfig) -> ShrinkShape:
    """Return the sizes of a shrink of x by Aᵀ or, backward, of dy by B."""
    forward = kind.wanted is None
    return ShrinkShape(
        L=kind.k if forward else kind.n, R=kind.r, TRANSPOSED=forward, BLOCK_M=config.block_m,
        BLOCK_L=config.block_k, BLOCK_R=padded_rank(kind.r),
    )  # fmt: skip

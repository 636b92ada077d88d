"""A call as the launchers and kernels take it."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.impl import gpu
from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.arguments import Codes, Mode, Rows
from lora_kernels.impl.triton.kernels.mask import PACKED_THRESHOLDS
from lora_kernels.operands.call import LinearCall
from lora_kernels.operands.dropout import LANES

WIDE_COUNTERS = 1 << 32  # of the mask, one for eight elements: from here on they need 64 bits
_HERE = nullcontext()


class Operands(NamedTuple):
    """A LinearCall with the factors' elements adjacent along rows, and dropout's two numbers.

    codes: what a kernel decodes of W beside its products; `weight` then has W's shape and dtype
        alone. blocksize: codes that share a scale. form: of a quantised W that isn't read yet;
        `weight` then is its codes.
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    seed: Tensor | None
    scaling: float | Tensor
    threshold: int
    codes: Codes | None = None
    blocksize: int = 0
    form: str | None = None

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

    def call(
        self, weight: Tensor, bias: Tensor | None = None, gain: arguments.Gain | None = None
    ) -> arguments.Call:
        """The call's parameters as kernels take them, W by rows."""
        w, a, b = self.codes or as_rows(weight), as_rows(self.a), as_rows(self.b)
        return arguments.Call(w, a, b, bias, self.seed, self.scaling_pointer, gain)

    def mode(self, m: int, mma: str) -> Mode:
        """How every kernel computes."""
        dropout = self.seed is not None
        # float32's sums lack a register for it.
        packed = dropout and self.weight.element_size() == 2
        packed &= mma != "mma" and self.threshold <= PACKED_THRESHOLDS.value
        wide = m * -(-self.weight.shape[1] // LANES) >= WIDE_COUNTERS
        return Mode(dropout, wide, packed, mma, _precision(self.weight.dtype))


def operands_of(call: LinearCall, weight: Tensor, form: str | None = None) -> Operands:
    """Return a call's operands; W as it lies, or its codes and their form."""
    (a, b, scaling), (seed, threshold) = call.adapter, call.dropout or (None, 0)
    factors = unit_rows(a), unit_rows(b)
    return Operands(weight, *factors, seed, scaling, threshold, form=form)


def as_rows(matrix: Tensor) -> Rows:
    """Return a matrix as kernels take it."""
    return Rows(matrix, matrix.stride(0))


def as_matrix(v: Tensor) -> Tensor:
    """Return v [..., C] as [M, C]."""
    return v if v.ndim == 2 else v.reshape(-1, v.shape[-1])


def unit_rows(t: Tensor) -> Tensor:
    """Return a matrix whose elements along a row are adjacent: itself, or a copy."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def floats(like: Tensor, count: int) -> Tensor:
    """Return uninitialised float32 on a tensor's device."""
    return like.new_empty(count, dtype=torch.float32)


def _precision(dtype: torch.dtype) -> str:
    """Return how float32 products are formed, as torch's own switch says."""
    return "tf32" if dtype == torch.float32 and gpu.tf32_allowed() else "ieee"


def on_device(t: Tensor) -> Any:
    """Make the tensor's GPU the current one: Triton launches there."""
    if t.device.type != "cuda" or t.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(t.device)

"""The launch that decodes a quantised W to memory of its own, for plans that read it dense."""

import torch
from torch import Tensor

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.decode import codebook_kernel, scaled_kernel
from lora_kernels.impl.triton.launch import Options, current
from lora_kernels.impl.triton.operands import as_rows, unit_rows
from lora_kernels.operands.codebook import CodebookWeight
from lora_kernels.operands.scaled import ScaledWeight
from lora_kernels.operands.weight import QuantizedWeight, Weight

_ELEMENTS, _WARPS = 4096, 4  # of a program
_PIECE = 256  # elements at most that are taken to share a scale


def as_stored(weight: Weight) -> Tensor | QuantizedWeight:
    """Return W as it lies, or where it is quantised the weight itself."""
    return weight if isinstance(weight, QuantizedWeight) else weight.decode()


def read_weight(
    weight: Tensor | QuantizedWeight, dtype: torch.dtype, wanted: bool = True
) -> Tensor:
    """Return W as it lies, or decoded; where it isn't `wanted`, memory for it that nobody reads."""
    if isinstance(weight, Tensor):
        return weight
    if not wanted:
        return weight.stored.new_empty(weight.shape, dtype=dtype)
    return decoded(weight, dtype)


def decoded(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return W [N, K] in a dtype, in new memory; what its owner keeps is read alone."""
    w = weight.stored.new_empty(weight.shape, dtype=dtype)
    if isinstance(weight, CodebookWeight):
        _decode_codebook(weight, w)
    else:
        assert isinstance(weight, ScaledWeight)
        _decode_scaled(weight, w)
    return w


def absmax_of(weight: CodebookWeight) -> arguments.Absmax:
    """Return the scales of blocks as kernels take them."""
    absmax, _, *nested = (part.contiguous() for part in weight.parts)
    return arguments.Absmax(absmax, *(nested or (None, None, None)))


def _decode_codebook(weight: CodebookWeight, w: Tensor) -> None:
    size, piece = w.numel(), min(weight.blocksize, _PIECE)
    args = {
        "codes": weight.stored.contiguous(), "code": weight.parts[1].contiguous(),
        "absmax": absmax_of(weight), "w": w,
    }  # fmt: skip
    shape = arguments.CodebookShape(size, weight.blocksize, piece, _ELEMENTS // piece)
    _run(codebook_kernel, -(-size // _ELEMENTS), args, shape)


def _decode_scaled(weight: ScaledWeight, w: Tensor) -> None:
    (n, k), (rows, columns) = w.shape, weight.block
    wide = min(128, max(16, 1 << (k - 1).bit_length()))
    shape = arguments.ScaledShape(
        n, k, rows, columns, weight.divisor, weight.format == "float8",
        BLOCK_N=_ELEMENTS // wide, BLOCK_K=wide,
    )  # fmt: skip
    args = {
        "codes": as_rows(unit_rows(_as_bytes(weight.stored))),
        "scales": _as_bytes(weight.parts[0].contiguous()), "w": w,
    }  # fmt: skip
    _run(scaled_kernel, -(-n // shape.BLOCK_N) * -(-k // wide), args, shape)


def _as_bytes(t: Tensor) -> Tensor:
    """Return float8's numbers as bytes: no architecture has to know their type."""
    return t.view(torch.uint8) if t.dtype.is_floating_point and t.element_size() == 1 else t


def _run(kernel: object, grid: int, args: dict[str, object], shape: object) -> None:
    current().run(kernel, grid, args, {"SHAPE": shape}, Options(_WARPS, 1))

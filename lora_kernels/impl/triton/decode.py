"""How a plan reads a quantised W: decoded to memory by a launch before, or in its own loop."""

import torch
from torch import Tensor

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.decode import (
    absmax_kernel,
    codebook_kernel,
    scaled_kernel,
)
from lora_kernels.impl.triton.launch import Options, current
from lora_kernels.impl.triton.operands import Operands, as_rows, operands_of, unit_rows
from lora_kernels.impl.triton.plan.config import Config
from lora_kernels.impl.triton.plan.plan import Plan
from lora_kernels.operands.call import LinearCall
from lora_kernels.operands.codebook import CodebookWeight
from lora_kernels.operands.scaled import ScaledWeight
from lora_kernels.operands.weight import QuantizedWeight, Weight

_ELEMENTS, _WARPS = 4096, 4  # of a program
_SCALES = 1024
_PIECE = 256  # elements at most that are taken to share a scale


def as_stored(weight: Weight) -> Tensor | QuantizedWeight:
    """Return W as it lies, or where it is quantised the weight itself."""
    return weight if isinstance(weight, QuantizedWeight) else weight.decode()


def read(call: LinearCall, rows: Tensor, chosen: Plan | None, product: bool = True) -> Operands:
    """Return a call's operands with W as a plan reads it, in the dtype of x or dy.

    chosen: of a quantised W. product: whether anything is multiplied by W; else its memory is never
        read, nor written.
    """
    weight = call.weight
    if not isinstance(weight, QuantizedWeight):
        return operands_of(call, weight.decode())
    assert chosen is not None
    if isinstance(chosen.config, Config) and chosen.config.codes:
        assert isinstance(weight, CodebookWeight)
        shape = torch.empty(weight.shape, dtype=rows.dtype, device="meta")
        codes = _codes_of(weight, product)
        return operands_of(call, shape)._replace(codes=codes, blocksize=weight.blocksize)
    if not product:
        return operands_of(call, rows.new_empty(weight.shape))
    return operands_of(call, decoded(weight, rows.dtype))


def in_memory(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return W as it lies, or decoded to a dtype."""
    return decoded(weight, dtype) if isinstance(weight, QuantizedWeight) else weight.decode()


def decoded(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return W [N, K] in a dtype, in new memory; what its owner keeps is read alone."""
    w = weight.stored.new_empty(weight.shape, dtype=dtype)
    if isinstance(weight, CodebookWeight):
        _decode_codebook(weight, w)
    else:
        assert isinstance(weight, ScaledWeight)
        _decode_scaled(weight, w)
    return w


def _codes_of(weight: CodebookWeight, product: bool) -> arguments.Codes:
    """Return codes and scales as a loop reads them; nested scales are made float32 before."""
    absmax = _absmax_of(weight)
    scales = absmax.numbers
    if absmax.code is not None:
        scales = absmax.scales.new_empty(absmax.numbers.numel())
        if product:
            constants = {"SIZE": scales.numel(), "BLOCK": _SCALES}
            grid = -(-scales.numel() // _SCALES)
            args = {"absmax": absmax, "out": scales}
            current().run(absmax_kernel, grid, args, constants, Options(_WARPS, 1))
    return arguments.Codes(weight.stored.contiguous(), scales, weight.parts[1].contiguous())


def _absmax_of(weight: CodebookWeight) -> arguments.Absmax:
    """Return the scales of blocks as kernels take them."""
    absmax, _, *nested = (part.contiguous() for part in weight.parts)
    return arguments.Absmax(absmax, *(nested or (None, None, None)))


def _decode_codebook(weight: CodebookWeight, w: Tensor) -> None:
    size, piece = w.numel(), min(weight.blocksize, _PIECE)
    args = {
        "codes": weight.stored.contiguous(), "code": weight.parts[1].contiguous(),
        "absmax": _absmax_of(weight), "w": w,
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

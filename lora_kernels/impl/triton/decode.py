"""How a plan reads a quantised W: decoded to memory by a launch before, or in its own loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_kernels.impl.triton.kernels import arguments
from lora_kernels.impl.triton.kernels.decode import (
    absmax_kernel,
    codebook_kernel,
    scaled_kernel,
)
from lora_kernels.impl.triton.launch import Executor, Options, current
from lora_kernels.impl.triton.operands import Operands, as_rows, operands_of, unit_rows
from lora_kernels.impl.triton.plan.config import Config, problem_of
from lora_kernels.impl.triton.plan.plan import Plan, rounded
from lora_kernels.operands.call import LinearCall, Wanted
from lora_kernels.operands.codebook import CodebookWeight
from lora_kernels.operands.scaled import ScaledWeight
from lora_kernels.operands.weight import QuantizedWeight, Weight

_ELEMENTS, _WARPS = 4096, 4  # of a program
_SCALES = 1024
_PIECE = 256  # elements at most that are taken to share a scale


# Reads W of a call whose operands have it as it is stored.
Read = Callable[[Operands, Any], Operands]


def stored(call: LinearCall) -> Operands:
    """Return a call's operands with W as it is stored: itself, or its codes."""
    weight = call.weight
    if isinstance(weight, QuantizedWeight):
        return operands_of(call, weight.stored, weight.form)
    return operands_of(call, weight.decode())


def parts_of(weight: Weight) -> tuple[Tensor, ...]:
    """Return what W is made of beside its codes; nothing of a dense one."""
    return weight.parts if isinstance(weight, QuantizedWeight) else ()


def as_it_lies(operands: Operands, weight: Weight) -> Operands:
    """Read a dense W."""
    return operands


def reading(
    rows: Tensor,
    operands: Operands,
    weight: QuantizedWeight,
    wanted: Wanted | None,
    executor: Executor,
) -> tuple[Read, Operands, Plan | None]:
    """Return how calls of a kind read W, in the dtype of x or dy: what is kept holds no tensor.

    With it come operands with W's shape and dtype, of which the kind's launches are made; and the
    plan, where its loop decodes W. Else the launches are those of a dense W.
    """
    dropout = operands.seed is not None
    problem = rounded(problem_of(rows, weight, operands.a, dropout, wanted))
    plan = executor.plan(problem, executor.device(rows))
    shape, product = _shape_of(weight, rows.dtype), wanted is None or wanted.dx
    if isinstance(plan.config, Config) and plan.config.codes:
        assert isinstance(weight, CodebookWeight)
        in_loop = operands._replace(weight=shape, blocksize=weight.blocksize, form=None)
        return InLoop(weight, rows.dtype, executor, product), in_loop, plan
    read = First(weight, rows.dtype, executor, product)
    return read, operands._replace(weight=shape, form=None), None


def _shape_of(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return torch.empty(weight.shape, dtype=dtype, device="meta")


class First:
    """Reads W by a launch that decodes it to memory.

    product: whether anything is multiplied by W; else its memory is never read, nor written.
    """

    def __init__(
        self, weight: QuantizedWeight, dtype: torch.dtype, executor: Executor, product: bool
    ) -> None:
        self._decode, self._product = Decoding(weight, dtype, executor), product

    def __call__(self, operands: Operands, weight: QuantizedWeight) -> Operands:
        """Return the operands with W in new memory."""
        w = self._decode(weight) if self._product else self._decode.room_for(weight)
        return operands._replace(weight=w, form=None)


class InLoop:
    """Reads codes and scales as a loop decodes them; nested scales are made float32 before."""

    def __init__(
        self, weight: CodebookWeight, dtype: torch.dtype, executor: Executor, product: bool
    ) -> None:
        self._dtype, self._product = dtype, product
        blocks = weight.parts[0].numel()
        constants, self._grid = {"SIZE": blocks, "BLOCK": _SCALES}, -(-blocks // _SCALES)
        self._flatten = executor.launcher(absmax_kernel, constants, Options(_WARPS, 1))

    def __call__(self, operands: Operands, weight: CodebookWeight) -> Operands:
        """Return the operands with codes in W's place."""
        absmax = _absmax_of(weight)
        scales = absmax.numbers
        if absmax.code is not None:
            scales = absmax.scales.new_empty(absmax.numbers.numel())
            if self._product:
                self._flatten(self._grid, {"absmax": absmax, "out": scales})
        codes = arguments.Codes(weight.stored.contiguous(), scales, weight.parts[1].contiguous())
        shape = _shape_of(weight, self._dtype)
        return operands._replace(weight=shape, codes=codes, blocksize=weight.blocksize, form=None)


class Decoding:
    """The launch that decodes W to memory, for calls of one kind."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, executor: Executor) -> None:
        self._dtype = dtype
        self._args: Callable[[Any], dict[str, Any]]
        shape: arguments.CodebookShape | arguments.ScaledShape
        if isinstance(weight, CodebookWeight):
            size, piece = weight.shape.numel(), min(weight.blocksize, _PIECE)
            kernel, self._args, self._grid = codebook_kernel, _codebook, -(-size // _ELEMENTS)
            shape = arguments.CodebookShape(size, weight.blocksize, piece, _ELEMENTS // piece)
        else:
            assert isinstance(weight, ScaledWeight)
            (n, k), (rows, columns) = weight.shape, weight.block
            wide = min(128, max(16, 1 << (k - 1).bit_length()))
            shape = arguments.ScaledShape(
                n, k, rows, columns, weight.divisor, weight.format == "float8",
                BLOCK_N=_ELEMENTS // wide, BLOCK_K=wide,
            )  # fmt: skip
            grid = -(-n // shape.BLOCK_N) * -(-k // wide)
            kernel, self._args, self._grid = scaled_kernel, _scaled, grid
        self._launch = executor.launcher(kernel, {"SHAPE": shape}, Options(_WARPS, 1))

    def room_for(self, weight: QuantizedWeight) -> Tensor:
        """Return uninitialised memory for W [N, K]."""
        return weight.stored.new_empty(weight.shape, dtype=self._dtype)

    def __call__(self, weight: QuantizedWeight) -> Tensor:
        """Return W [N, K] in new memory; what its owner keeps is read alone."""
        w = self.room_for(weight)
        self._launch(self._grid, {**self._args(weight), "w": w})
        return w


def decoded(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return W [N, K] in a dtype, in new memory."""
    return Decoding(weight, dtype, current())(weight)


def _absmax_of(weight: CodebookWeight) -> arguments.Absmax:
    """Return the scales of blocks as kernels take them."""
    absmax, _, *nested = (part.contiguous() for part in weight.parts)
    return arguments.Absmax(absmax, *(nested or (None, None, None)))


def _codebook(weight: CodebookWeight) -> dict[str, Any]:
    return {
        "codes": weight.stored.contiguous(), "code": weight.parts[1].contiguous(),
        "absmax": _absmax_of(weight),
    }  # fmt: skip


def _scaled(weight: ScaledWeight) -> dict[str, Any]:
    return {
        "codes": as_rows(unit_rows(_as_bytes(weight.stored))),
        "scales": _as_bytes(weight.parts[0].contiguous()),
    }


def _as_bytes(t: Tensor) -> Tensor:
    """Return float8's numbers as bytes: no architecture has to know their type."""
    return t.view(torch.uint8) if t.dtype.is_floating_point and t.element_size() == 1 else t

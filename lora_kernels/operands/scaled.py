"""Eight bits a weight and a scale a block of them: int8 by rows, float8 (e4m3) by rows or tiles::

    W[n, k] = rn(codes[n, k] · s[n // rows, k // columns])      s = rn(scales / divisor)

The product is formed in float32 and rounded once, to the dtype of W. LLM.int8's scales are the
largest magnitudes of rows, 127 times what a code of 1 stands for; others have divisor 1.
"""

import torch
from torch import Tensor

from lora_kernels.operands.weight import Misfit, QuantizedWeight, numbers_of

_CODES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_PIECE = 1 << 20  # elements decoded at a time, 8 bytes each beside W itself


class ScaledWeight(QuantizedWeight):
    """Codes of eight bits, each block of which has a scale.

    Args:
        word: "int8" or "float8".
        block: rows and columns of a block; the last ones may be smaller.
        codes: int8 or float8_e4m3fn, [N, K].
        scales: a float for each block, row after row of blocks.
        divisor: of the scales, 127 of LLM.int8.
    """

    def __init__(
        self, word: str, block: tuple[int, int], codes: Tensor, scales: Tensor, divisor: int = 1
    ) -> None:
        self.format, self.form = word, f"{word}:{block[0]}:{block[1]}:{divisor}"
        self.shape, self.block, self.divisor = codes.shape, block, divisor
        self.stored, self.parts = codes, (scales,)

    @classmethod
    def of_form(cls, form: str, codes: Tensor, parts: tuple[Tensor, ...]) -> "ScaledWeight":
        """Return the weight that an operator was given, "int8:rows:columns:divisor"."""
        rows, columns, divisor = numbers_of(form, "rows", "columns", "divisor")
        if len(parts) != 1:
            raise ValueError(f"parts: expected the scales, got {len(parts)} tensors")
        return cls(form.partition(":")[0], (rows, columns), codes, parts[0], divisor)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W: a product in float32, rounded once to `dtype`; float32 by default."""
        (n, k), (rows, columns), codes = self.shape, self.block, self.stored
        scales = self.parts[0].float().view(-(-n // rows), -(-k // columns))
        if self.divisor != 1:
            scales = scales * (1 / self.divisor)  # as bitsandbytes does: rounded, then multiplied
        weight = torch.empty((n, k), dtype=dtype or torch.float32, device=codes.device)
        step = rows * max(1, _PIECE // max(1, rows * k))
        step = n if torch.compiler.is_compiling() else step
        for start in range(0, n, step):
            end = min(start + step, n)
            own = scales[start // rows : -(-end // rows)]
            if rows > 1:
                own = own.repeat_interleave(rows, 0)[: end - start]
            if columns < k:
                own = own.repeat_interleave(columns, 1)[:, :k]
            weight[start:end] = codes[start:end].float() * own
        return weight

    def misfit(self) -> Misfit:
        """Return the error that names what doesn't fit in codes, parts and numbers, or None."""
        codes, scales, expected = self.stored, self.parts[0], _CODES[self.format]
        if not isinstance(codes, Tensor) or codes.dtype != expected:
            got = getattr(codes, "dtype", type(codes).__name__)
            return TypeError(f"weight: expected codes in {expected}, got {got}")
        if codes.ndim != 2:
            return ValueError(f"weight: expected codes [N, K], got shape {list(codes.shape)}")
        if not isinstance(scales, Tensor) or scales.dtype not in _SCALES:
            got = getattr(scales, "dtype", type(scales).__name__)
            return TypeError(f"weight: expected scales in float32, or less wide, got {got}")
        (n, k), (rows, columns) = codes.shape, self.block
        blocks = -(-n // rows) * -(-k // columns)
        if scales.numel() != blocks:
            return ValueError(
                f"weight: expected {blocks} scales for [{n}, {k}] in blocks of [{rows}, "
                f"{columns}], got {scales.numel()}"
            )
        return None

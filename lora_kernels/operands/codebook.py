"""Four bits a weight that stand for sixteen numbers: NF4 and FP4 as bitsandbytes stores them.

Codes lie row after row without a gap, two in a byte, the first of them in its high half. A block of
`blocksize` codes shares a scale, wherever rows end::

    W[i] = rn(code[nibble i] · absmax[i // blocksize])                      i = n · K + k
    absmax[b] = rn(rn(code2[byte b] · absmax2[b // 256]) + offset)          where it is nested

rn rounds to the nearest, ties to even: the products to float32, W itself once more to its dtype.
"""

import torch
from torch import Tensor

from lora_kernels.operands.weight import Misfit, QuantizedWeight, numbers_of

NESTED_BLOCK = 256  # scales that share a scale of their own
SMALLEST_BLOCK, LARGEST_BLOCK = 32, 4096
# W is decoded in pieces of so many elements, 10 bytes each beside W itself.
_PIECE = 1 << 20


class CodebookWeight(QuantizedWeight):
    """NF4 or FP4: packed codes, and what the formulas above name.

    Args:
        word: "nf4" or "fp4", which says nothing of the code: that is among the parts.
        shape: [N, K].
        blocksize: codes that share a scale, a power of two from 32 to 4096.
        codes: uint8 [(N · K + 1) // 2].
        parts: absmax and code; or where absmax is nested its bytes, code, code2, absmax2, offset.
    """

    def __init__(
        self,
        word: str,
        shape: tuple[int, int],
        blocksize: int,
        codes: Tensor,
        parts: tuple[Tensor, ...],
    ) -> None:
        n, k = shape
        self.format, self.form = word, f"{word}:{blocksize}:{n}:{k}"
        self.shape, self.blocksize = torch.Size((n, k)), blocksize
        self.stored, self.parts = codes, parts

    @classmethod
    def of_form(cls, form: str, codes: Tensor, parts: tuple[Tensor, ...]) -> "CodebookWeight":
        """Return the weight that an operator was given, "nf4:blocksize:N:K"."""
        blocksize, n, k = numbers_of(form, "blocksize", "N", "K")
        return cls(form.partition(":")[0], (n, k), blocksize, codes, parts)

    def absmax(self) -> Tensor:
        """Return the scale of each block, float32."""
        if len(self.parts) == 2:
            return self.parts[0]
        bytes_, _, code2, absmax2, offset = self.parts
        scales = absmax2.repeat_interleave(NESTED_BLOCK)[: bytes_.numel()]
        return code2[bytes_.int()] * scales + offset

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W: a product in float32, rounded once to `dtype`; float32 by default."""
        codes, code, count = self.stored, self.parts[1], self.shape.numel()
        # Of each byte the two numbers, that of its high half first.
        pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), 1)
        absmax, size = self.absmax(), self.blocksize
        weight = torch.empty(count, dtype=dtype or torch.float32, device=codes.device)
        piece = count if torch.compiler.is_compiling() else _PIECE
        for start in range(0, count, piece):
            end = min(start + piece, count)
            numbers = pairs[codes[start // 2 : (end + 1) // 2].int()].view(-1)[: end - start]
            blocks = absmax[start // size : -(-end // size)]
            weight[start:end] = numbers * blocks.repeat_interleave(size)[: end - start]
        return weight.view(self.shape)

    def misfit(self) -> Misfit:
        """Return the error that names what doesn't fit in codes, parts and numbers, or None."""
        size, count = self.blocksize, self.shape.numel()
        if not SMALLEST_BLOCK <= size <= LARGEST_BLOCK or size & (size - 1):
            return ValueError(
                f"weight: expected a block of 2^n codes, {SMALLEST_BLOCK} to {LARGEST_BLOCK}, "
                f"got {size}"
            )
        if len(self.parts) not in (2, 5):
            return ValueError(f"weight: expected 2 parts, or 5 nested, got {len(self.parts)}")
        blocks = -(-count // size)
        absmax, code, *nested = self.parts
        expected = [
            ("codes", self.stored, torch.uint8, (count + 1) // 2),
            ("absmax", absmax, torch.uint8 if nested else torch.float32, blocks),
            ("code", code, torch.float32, 16),
        ]
        if nested:
            expected += [
                ("nested code", nested[0], torch.float32, 256),
                ("nested absmax", nested[1], torch.float32, -(-blocks // NESTED_BLOCK)),
                ("nested offset", nested[2], torch.float32, 1),
            ]
        return next((error for each in expected if (error := self._unfit(*each))), None)

    def _unfit(self, name: str, t: Tensor, dtype: torch.dtype, size: int) -> Misfit:
        if not isinstance(t, Tensor) or t.dtype != dtype:
            got = getattr(t, "dtype", type(t).__name__)
            return TypeError(f"weight: expected {name} in {dtype}, got {got}")
        if t.numel() != size:
            n, k = self.shape
            return ValueError(
                f"weight: expected {size} elements of {name} for [{n}, {k}] in blocks of "
                f"{self.blocksize}, got {t.numel()}"
            )
        return None

"""oneDNN's float32 products on CPUs: where they are faster, and within the error budget."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.operands.onednn import CHAIN, parts

# Multiplications from which oneDNN's call, dearer from Python, pays. 2026-11-24, Zen 5: 0.9 of
# MKL's time at 256x64x64, 0.5 at 64x512x512.
WORK = 1 << 21
# Rows from which copying a part of W, whose rows lie apart, pays.
ROWS_TO_COPY_FOR = 64


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weightᵀ + bias; x [M, L], weight [C, L], float32 sums in parts of L."""
    y = None
    for start, part in parts(weight):
        columns = x[:, start : start + part.shape[1]]
        if y is None:
            y = torch.ops.mkldnn._linear_pointwise(columns, part, bias, "none", [], "")
        else:
            y = torch.ops.mkldnn._linear_pointwise.binary(columns, y, part, None, "add")
    assert y is not None
    return y


def preferred(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` beats MKL: float32 on Zen 4 and later, but for small work and for copies."""
    copied = weight.shape[1] > CHAIN and weight.stride(0) != 1
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[0] >= (ROWS_TO_COPY_FOR if copied else 16)
        and x.shape[0] * weight.numel() >= WORK
        and _beats_mkl()
    )


@cache
def _beats_mkl() -> bool:
    """Whether this processor is an AMD one with AVX-512.

    oneDNN's sgemm takes 0.4 to 0.9 of MKL's time there. 2026-11-29, Zen 3, which has AVX2 alone:
    1.03 to 1.4 of it, and 1.6 to 1.8 where columns are adjacent.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and cpuinfo.exists()
    ):
        return False
    text = cpuinfo.read_text()
    return "AuthenticAMD" in text and "avx512f" in text

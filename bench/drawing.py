"""The drawing of forward's mask by itself, as a kernel to count."""

import torch
import triton
import triton.language as tl

from lora_kernels._triton.config import Config, Layer
from lora_kernels._triton.forward import draw_words
from lora_kernels._triton.launch import Options
from lora_kernels._triton.linear import DRAWN
from lora_kernels._triton.record import Launch
from lora_kernels.dropout import LANES


@triton.jit(do_not_specialize=["share", "threshold", "M"])
def draw_kernel(
    mask, flags, seed_pointer, share, threshold, M, K: tl.constexpr, MASK_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, PRODUCERS: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """Draw the words of all row panels, a panel at a time."""
    seed = tl.load(seed_pointer)
    draw_words(
        mask, flags, 1, share, seed, threshold, M, K, MASK_STRIDE, BLOCK_M, PRODUCERS, DRAWN, False
    )


def drawing(layer: Layer, config: Config, panels: int) -> Launch:
    """Return the launch that draws the words of some row panels in one program."""
    steps = -(-layer.k // DRAWN)
    stride = steps * DRAWN // LANES
    args = {
        "mask": torch.zeros(panels * config.rows // 4, stride, dtype=torch.int32),
        "flags": torch.zeros(panels, dtype=torch.int32), "seed_pointer": torch.tensor([5]),
        "share": steps, "threshold": 6554, "M": panels * config.rows,
    }  # fmt: skip
    constants = {
        "K": layer.k, "MASK_STRIDE": stride, "BLOCK_M": config.rows,
        "PRODUCERS": config.producers, "DRAWN": DRAWN,
    }  # fmt: skip
    return Launch(draw_kernel, 1, args, constants, Options(config.warps, config.stages))

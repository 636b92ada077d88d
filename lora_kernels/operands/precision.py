"""In which dtype the adapter branch of a call is computed."""

import torch
from torch import Tensor

from lora_kernels.operands.call import Adapter


def is_outranged(dtype: torch.dtype, adapter: Adapter) -> bool:
    """Whether adapters of another dtype stand beside a float16 x.

    They have a longer range than its own, 65,504, and so may their products.
    """
    return dtype == torch.float16 and not adapter.a.dtype == adapter.b.dtype == dtype


def ranged(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype with the range of products: float32 in float16's place, else itself."""
    return torch.float32 if dtype == torch.float16 else dtype


def has_wide_branch(x: Tensor, adapter: Adapter) -> bool:
    """Whether "eager" and "reference" keep the adapter branch of a float16 x in float32.

    Where it is outranged, on CPUs alone: on a GPU x in float32 would cost more than the base
    product does.
    """
    return x.is_cpu and is_outranged(x.dtype, adapter)

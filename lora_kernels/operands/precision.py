"""In which dtype the adapter branch of a call is computed."""

import torch
from torch import Tensor

from lora_kernels.operands.call import Adapter


def has_wide_branch(x: Tensor, adapter: Adapter) -> bool:
    """Whether "eager" and "reference" keep the adapter branch of a float16 x in float32.

    Adapters of another dtype beside it have a longer range than its own, 65,504, and so may their
    products. On CPUs alone: on a GPU x in float32 would cost more than the base product does.
    """
    return (
        x.dtype == torch.float16
        and x.is_cpu
        and not adapter.a.dtype == adapter.b.dtype == torch.float16
    )

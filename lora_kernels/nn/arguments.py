"""What LoRALinear takes, checked before anything is changed."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_kernels.bypass import PLAIN_TENSORS
from lora_kernels.checks import (
    FLOAT_DTYPES,
    check_dropout_p,
    check_finite,
    check_rank,
    is_dtensor,
    lack_of_memory,
)
from lora_kernels.dispatch import check_impl
from lora_kernels.quantized import Base, read_quantized

BIAS_MODES = ("none", "all", "lora_only")
OWNER_READS = "expected 0 around MultiheadAttention's out_proj, which reads the weight alone"


def check_linear(
    linear: nn.Module, lora_dropout: float = 0.0, bias: str = "none", use_dora: bool = False
) -> None:
    """Raise unless `linear` computes x Wᵀ + bias from a float weight, and the settings suit it."""
    quantized = read_quantized(linear)
    if isinstance(quantized, Base):
        if use_dora:
            raise TypeError("linear: expected a float weight with use_dora, got a quantised one")
        return
    if quantized is not None:
        raise TypeError(f"linear: expected a layer that can be read as it is, but its {quantized}")
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
    # A quantised layer is often a subclass; its forward would silently be bypassed.
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        raise TypeError(
            f"linear: expected torch.nn.Linear's own forward, got one of {type(linear).__name__}"
        )
    for name, t in (("weight", linear.weight), ("bias", linear.bias)):
        if t is not None and type(t) not in PLAIN_TENSORS and not is_dtensor(t):
            raise TypeError(f"linear: expected a plain {name}, got a {type(t).__name__}")
    if use_dora and is_dtensor(linear.weight):
        raise TypeError("linear: expected a plain weight with use_dora, got a DTensor")
    if linear.weight.dtype not in FLOAT_DTYPES:
        raise TypeError(
            "linear: expected a float16, bfloat16, float32 or float64 weight, "
            f"got {linear.weight.dtype}"
        )
    if bias != "none" and linear.bias is not None and linear._parameters.get("bias") is None:
        raise TypeError(f"linear: expected a bias parameter for bias={bias!r}, got a computed bias")
    if lora_dropout and isinstance(linear, NonDynamicallyQuantizableLinear):
        raise ValueError(f"lora_dropout: {OWNER_READS}, got {lora_dropout}")


def check_settings(
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    bias: str,
    adapter_dtype: torch.dtype | None,
    impl: str,
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless LoRALinear takes the settings."""
    check_rank(r)
    check_finite(lora_alpha, name="lora_alpha")
    check_dropout_p(lora_dropout, name="lora_dropout")
    if bias not in BIAS_MODES:
        raise ValueError(f"bias: expected one of {', '.join(map(repr, BIAS_MODES))}, got {bias!r}")
    if adapter_dtype not in (None, *FLOAT_DTYPES):
        raise TypeError(
            "adapter_dtype: expected float16, bfloat16, float32, float64 or None, "
            f"got {adapter_dtype}"
        )
    check_impl(impl)


def has_plain_matrix(module: nn.Module) -> bool:
    """Whether a module's weight is a float matrix with memory."""
    weight: Any = module.weight
    if type(weight) not in PLAIN_TENSORS and not is_dtensor(weight):
        return False
    return weight.dtype in FLOAT_DTYPES and weight.ndim == 2 and lack_of_memory(weight) is None

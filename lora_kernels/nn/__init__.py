"""Layers with parameters of their own; what they compute stands in `ops`."""

from lora_kernels.nn.linear import LoRALinear

__all__ = ["LoRALinear"]

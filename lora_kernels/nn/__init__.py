"""Layers with parameters of their own; what they compute stands in `ops`."""

from lora_kernels.nn.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_kernels.nn.embedding import LoRAEmbedding
from lora_kernels.nn.experts import LoRAExperts
from lora_kernels.nn.linear import LoRALinear

__all__ = ["LoRAConv1d", "LoRAConv2d", "LoRAConv3d", "LoRAEmbedding", "LoRAExperts", "LoRALinear"]

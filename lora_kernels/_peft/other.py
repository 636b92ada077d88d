"""PEFT's layers beside its linear one, and the class of each with a fused forward."""

from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, LoraLayer, ParamWrapper

from lora_kernels._peft.conv import FusedConv1d, FusedConv2d, FusedConv3d
from lora_kernels._peft.embedding import FusedEmbedding
from lora_kernels._peft.experts import FusedExperts

FUSED: dict[type[LoraLayer], type[LoraLayer]] = {
    Embedding: FusedEmbedding,
    Conv1d: FusedConv1d,
    Conv2d: FusedConv2d,
    Conv3d: FusedConv3d,
    ParamWrapper: FusedExperts,
}

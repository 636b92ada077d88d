"""LoRA layers at the cost of their frozen GEMM."""

from typing import TYPE_CHECKING, Any

from lora_kernels._version import __version__ as __version__
from lora_kernels.adapter_files import load_adapter, save_adapter
from lora_kernels.batches import adapter_batch
from lora_kernels.casting import CastReport, cast_weights_
from lora_kernels.explanation import Explanation, explain
from lora_kernels.nn import (
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAEmbedding,
    LoRAExperts,
    LoRALinear,
)
from lora_kernels.ops.conv import lora_conv1d, lora_conv2d, lora_conv3d
from lora_kernels.ops.dora import lora_dora_linear
from lora_kernels.ops.dropout_mask import dropout_mask
from lora_kernels.ops.embedding import lora_embedding
from lora_kernels.ops.grouped import grouped_lora_linear
from lora_kernels.ops.linear import lora_linear
from lora_kernels.patching import PatchReport, patch_peft, report, unpatch_peft
from lora_kernels.prepack import PrepackReport, prepack_, unprepack_
from lora_kernels.quantized import quantized_weight
from lora_kernels.tuning import tune
from lora_kernels.usage import LayerUse, UsageReport

if TYPE_CHECKING:
    from lora_kernels.integrations.transformers import TrainerCallback as TrainerCallback

__all__ = [
    "CastReport",
    "Explanation",
    "LayerUse",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALinear",
    "PatchReport",
    "PrepackReport",
    "UsageReport",
    "adapter_batch",
    "cast_weights_",
    "dropout_mask",
    "explain",
    "grouped_lora_linear",
    "load_adapter",
    "lora_conv1d",
    "lora_conv2d",
    "lora_conv3d",
    "lora_dora_linear",
    "lora_embedding",
    "lora_linear",
    "patch_peft",
    "prepack_",
    "quantized_weight",
    "report",
    "save_adapter",
    "tune",
    "unpatch_peft",
    "unprepack_",
]


def __getattr__(name: str) -> Any:
    # Its base class is transformers', which nothing else here needs. Not in __all__: `import *`
    # would ask for it.
    if name != "TrainerCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.util import find_spec

    if find_spec("transformers") is None:
        raise ImportError("lora_kernels.TrainerCallback: expected transformers, got no such module")
    from lora_kernels.integrations.transformers import TrainerCallback

    return TrainerCallback

"""LoRA layers at the cost of their frozen GEMM."""

from lora_kernels.adapter_files import load_adapter, save_adapter
from lora_kernels.explanation import Explanation, explain
from lora_kernels.functional import dropout_mask, lora_linear
from lora_kernels.nn import LoRALinear
from lora_kernels.patching import PatchReport, patch_peft, report, unpatch_peft
from lora_kernels.prepack import PrepackReport, prepack_, unprepack_
from lora_kernels.usage import LayerUse, UsageReport

__version__ = "0.2.0"
__all__ = [
    "Explanation",
    "LayerUse",
    "LoRALinear",
    "PatchReport",
    "PrepackReport",
    "UsageReport",
    "dropout_mask",
    "explain",
    "load_adapter",
    "lora_linear",
    "patch_peft",
    "prepack_",
    "report",
    "save_adapter",
    "unpatch_peft",
    "unprepack_",
]

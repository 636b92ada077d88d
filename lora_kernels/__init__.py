"""LoRA layers at the cost of their frozen GEMM."""

from lora_kernels.adapter_files import load_adapter, save_adapter
from lora_kernels.functional import Explanation, dropout_mask, explain, lora_linear
from lora_kernels.nn import LoRALinear
from lora_kernels.patching import PatchReport, patch_peft, unpatch_peft

__version__ = "0.1.0"
__all__ = [
    "Explanation",
    "LoRALinear",
    "PatchReport",
    "dropout_mask",
    "explain",
    "load_adapter",
    "lora_linear",
    "patch_peft",
    "save_adapter",
    "unpatch_peft",
]

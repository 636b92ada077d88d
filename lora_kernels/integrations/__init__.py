"""What switches `patch_peft` on from trainers; a module here needs the library that it serves."""

import os
import sys
from typing import Any

from torch import nn


def has_adapters(model: Any) -> bool:
    """Whether PEFT has put adapters into a model: `get_peft_model`, or a model's `add_adapter`."""
    return isinstance(model, nn.Module) and bool(getattr(model, "peft_config", None))


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_peft` was called for a model, also where it left each layer."""
    return any("_lora_kernels_impl" in vars(module) for module in model.modules())


def tell(report: object) -> None:
    """Write a report to standard error, in the first process of a run."""
    # What torchrun and accelerate set; a process by itself has none.
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{report}\n")

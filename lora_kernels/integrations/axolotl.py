"""A plugin for Axolotl. In its configuration:

plugins:
  - lora_kernels.integrations.axolotl.LoraKernelsPlugin
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from lora_kernels.dispatch import check_impl
from lora_kernels.integrations import has_adapters, is_patched, tell
from lora_kernels.patching import patch_peft

# Axolotl's own LoRA kernels, which it enables by itself: they read adapters without calling layers.
_RIVALS = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel")


class LoraKernelsArgs(BaseModel):
    """Keys of Axolotl's configuration: `patch_peft`'s arguments."""

    lora_kernels_impl: str = "auto"
    lora_kernels_prepack: bool = False

    @field_validator("lora_kernels_impl")
    @classmethod
    def _known(cls, impl: str) -> str:
        check_impl(impl)
        return impl


class LoraKernelsPlugin(BasePlugin):
    """Patches the PEFT model that Axolotl made or loaded, as `patch_peft` does."""

    def register(self, cfg: Any) -> None:
        """Switch Axolotl's own LoRA kernels off.

        Raises:
            ValueError: the configuration asks for one of them.
        """
        for key in _RIVALS:
            if cfg.get(key):
                raise ValueError(f"{key}: expected false beside lora_kernels' plugin, got true")
            cfg[key] = False

    def get_input_args(self) -> str:
        """Return where the keys are declared."""
        return f"{__name__}.{LoraKernelsArgs.__name__}"

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        """Patch the model, where its adapters aren't left to the trainer (DPO, IPO, KTO)."""
        if has_adapters(model):
            self._patch(cfg, model)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Patch the model whose adapters the trainer has made."""
        if not is_patched(trainer.model):
            self._patch(cfg, trainer.model)

    def _patch(self, cfg: Any, model: Any) -> None:
        # Keys that hold their default may be left out of a validated configuration.
        impl, prepack = cfg.get("lora_kernels_impl"), cfg.get("lora_kernels_prepack")
        tell(patch_peft(model, impl=impl or "auto", prepack=bool(prepack)))

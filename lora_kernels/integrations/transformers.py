"""A callback for transformers' Trainer and trainers built on it, such as TRL's."""

from typing import Any

import transformers

from lora_kernels.dispatch import check_impl
from lora_kernels.integrations import has_adapters, is_patched, tell
from lora_kernels.patching import PatchReport, patch_peft


class TrainerCallback(transformers.TrainerCallback):
    """Patches a trainer's PEFT model, as `patch_peft` does: `callbacks=[lk.TrainerCallback()]`.

    The model is patched at the end of the trainer's construction: it has its adapters and its
    device by then, and neither an optimizer nor accelerate, FSDP or torch.compile have seen it. A
    model that comes later (a callback added to a trainer, adapters added to its model, `model_init`
    called again) is patched when training begins. The report is written to standard error by the
    first process of a run.

    Args:
        impl, prepack: as for `patch_peft`.

    Attributes:
        report: the last `PatchReport`, or None before there is one.

    Raises:
        ValueError: `impl` is unknown; in training, the model has no LoRA layer.

    Example:
        >>> callback = lk.TrainerCallback(prepack=True)
        >>> callback.prepack, callback.report  # the report comes with a trainer's model
        (True, None)
    """

    def __init__(self, *, impl: str = "auto", prepack: bool = False) -> None:
        check_impl(impl)
        self.impl, self.prepack = impl, prepack
        self.report: PatchReport | None = None

    def on_init_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Patch the trainer's model, where it has adapters."""
        if has_adapters(model):
            self._patch(model)

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Patch the model that is trained, unless it is."""
        if not is_patched(model):
            self._patch(model)

    def _patch(self, model: Any) -> None:
        self.report = patch_peft(model, impl=self.impl, prepack=self.prepack)
        tell(self.report)

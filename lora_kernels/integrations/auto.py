"""What LORA_KERNELS_AUTO switches on: PEFT's models are patched as they are made."""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from lora_kernels.dispatch import CHOICES
from lora_kernels.integrations import tell
from lora_kernels.patching import patch_peft

_LOGGER = logging.getLogger("lora_kernels")


def switch_on(peft: Any) -> None:
    """Patch what `get_peft_model` and `PeftModel.from_pretrained` return from now on.

    Args:
        peft: the module that defines the first and imports the second.

    Raises:
        ValueError: LORA_KERNELS_AUTO isn't understood.
    """
    options = read(os.environ["LORA_KERNELS_AUTO"])
    model = peft.PeftModel
    peft.get_peft_model = _patching(peft.get_peft_model, **options)
    model.from_pretrained = classmethod(_patching(model.from_pretrained.__func__, **options))


def read(value: str) -> dict[str, Any]:
    """Return `patch_peft`'s arguments from the variable's value.

    Raises:
        ValueError: it isn't "1", an implementation's name, "prepack", or two of them.
    """
    words = [word.strip() for word in value.split(",")]
    named = [word for word in words if word in CHOICES]
    if len(named) > 1 or not set(words) <= {"1", "prepack", *CHOICES}:
        raise ValueError(
            "LORA_KERNELS_AUTO: expected 0, 1 or words with commas between them, of which one may "
            f"be an implementation ({', '.join(CHOICES)}) and one prepack, got {value!r}"
        )
    return {"impl": named[0] if named else "auto", "prepack": "prepack" in words}


def _patching(make: Callable[..., Any], impl: str, prepack: bool) -> Callable[..., Any]:
    """Return `make`, which makes a PEFT model, with the model patched."""

    @functools.wraps(make)
    def make_and_patch(*args: Any, **kwargs: Any) -> Any:
        model = make(*args, **kwargs)
        try:
            tell(patch_peft(model, impl=impl, prepack=prepack))
        except (ImportError, TypeError, ValueError) as error:
            # The program didn't ask for it, so it goes on with PEFT's forward, unless an
            # implementation was named.
            if impl != "auto":
                raise
            _LOGGER.warning(
                "LORA_KERNELS_AUTO: a %s runs unpatched: %s", type(model).__name__, error
            )
        return model

    return make_and_patch

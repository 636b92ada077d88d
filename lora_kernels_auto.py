"""The environment switch LORA_KERNELS_AUTO: what `import torch` runs of this package.

torch calls the entry points of its group "torch.backends" at the end of its import; pyproject.toml
names `autoload` there. It lies outside the package since it runs in every process that imports
torch, also where the switch is off: it costs next to nothing, and can't import torch itself.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# It defines get_peft_model and imports PeftModel, before any other module binds either.
_MODULE = "peft.mapping_func"


def autoload() -> None:
    """Where LORA_KERNELS_AUTO is set, have PEFT's models patched as they are made."""
    if os.environ.get("LORA_KERNELS_AUTO", "0") in ("", "0"):
        return
    # Two installations of this package, one behind the other on the path, both have the entry.
    if not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


class _AfterPeft(MetaPathFinder):
    """Runs the switch once PEFT's module has been executed, found and loaded as ever."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute, loader = spec.loader.exec_module, vars(spec.loader)

            def execute_and_switch_on(module: ModuleType) -> None:
                del loader["exec_module"]
                execute(module)
                from lora_kernels.integrations.auto import switch_on

                switch_on(module)

            loader["exec_module"] = execute_and_switch_on
        return spec

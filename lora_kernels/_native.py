"""The compiled CPU part, where it was built: found and loaded once, when first asked for."""

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_cpu.abi3.so")
BUILT = LIBRARY.exists()


@cache
def absence() -> str | None:
    """Load the library; return None, or the reason why its operators are not there."""
    if not LIBRARY.exists():
        return "not built when the package was installed (see setup.py)"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} can't be loaded: {error.__cause__ or error}"
    return None

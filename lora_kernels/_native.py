"""The compiled parts, where they were built: each found and loaded once, when first asked for."""

from functools import cache
from pathlib import Path

import torch

LIBRARIES = {part: Path(__file__).with_name(f"_{part}.abi3.so") for part in ("cpu", "cuda")}
BUILT = {part: library.exists() for part, library in LIBRARIES.items()}


@cache
def absence(part: str) -> str | None:
    """Load the part "cpu" or "cuda"; return None, or the reason why its operators aren't there."""
    library = LIBRARIES[part]
    if not library.exists():
        return "not built when the package was installed (see setup.py)"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} can't be loaded: {error.__cause__ or error}"
    return None

"""The compiled parts, where they were built: each found and loaded once, when first asked for."""

import json
import os
from functools import cache
from pathlib import Path

import torch

# As setuptools names what serves several versions of Python.
SUFFIX = ".pyd" if os.name == "nt" else ".abi3.so"
LIBRARIES = {part: Path(__file__).with_name(f"_{part}{SUFFIX}") for part in ("cpu", "cuda")}
BUILT = {part: library.exists() for part, library in LIBRARIES.items()}


@cache
def absence(part: str) -> str | None:
    """Load the part "cpu" or "cuda"; return None, or the reason why its operators aren't there."""
    library = LIBRARIES[part]
    if not library.exists():
        return f"not built when the package was installed: {_left_out(part)}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} can't be loaded: {error.__cause__ or error}"
    return None


def _left_out(part: str) -> str:
    """Return why the build left a part out, as setup.py wrote it down."""
    try:
        reasons = json.loads(Path(__file__).with_name("_left_out.json").read_text())
    except FileNotFoundError:
        reasons = {}
    return str(reasons.get(part, "see README.md, Install"))

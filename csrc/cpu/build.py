"""How the CPU part is compiled: without torch, by the declarations of csrc/torch_abi."""

import os
from pathlib import Path

from csrc import toolchain

HERE = Path(__file__).parent


def left_out_reason() -> str | None:
    """Return why the CPU part is not built, or None."""
    if os.environ.get("LORA_KERNELS_CPU") == "0":
        return "LORA_KERNELS_CPU=0"
    return toolchain.no_compiler_reason()


def build(folder: Path, target: Path) -> None:
    """Compile the part, and link it into `target`.

    Raises:
        BuildError: it can't be built.
    """
    flags, links = ["-I", str(HERE.parent / "torch_abi"), "-g0"], []
    if sanitizers := os.environ.get("LORA_KERNELS_SANITIZE"):
        # At -O1 reports name the line; aborting on the first makes a test fail.
        links = [f"-fsanitize={sanitizers}"]
        flags += [*links, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    objects = toolchain.compile_sources(folder, sorted(HERE.rglob("*.cpp")), flags)
    toolchain.link(objects, target, folder, links)

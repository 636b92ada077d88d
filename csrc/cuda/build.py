"""How the CUDA part is compiled: by nvcc, called through ninja, beside any build of torch."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
# One fat binary; PTX of the first serves whatever is newer and not in the list.
ARCHS = "8.0+PTX;8.6;8.9;9.0a;10.0;12.0"
FLAGS = (
    "-std=c++20 -O3 -lineinfo --expt-relaxed-constexpr -Werror all-warnings --threads 0 "
    "-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
)
RULE = """
rule nvcc
  command = {nvcc} {flags} $archs -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
"""


def left_out_reason() -> str | None:
    """Return why the CUDA part is not built, or None."""
    if os.environ.get("LORA_KERNELS_CUDA") == "0":
        return "LORA_KERNELS_CUDA=0"
    if shutil.which("nvcc") is None:
        return "no nvcc on PATH"
    if shutil.which("ninja") is None:
        return "no ninja on PATH"
    if runtime_library() is None:
        return "no libcudart_static.a beside nvcc"
    return None


def runtime_library() -> Path | None:
    """Return CUDA's static runtime, which needs no CUDA build of torch."""
    nvcc = shutil.which("nvcc")
    dry_run = [nvcc, "--dryrun", "-x", "cu", os.devnull] if nvcc else ["false"]
    said = subprocess.run(dry_run, capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    root = Path(found[1].strip()) if found else Path("/usr/local/cuda")
    folders = [root / "lib64", root / "lib", root / "targets" / "x86_64-linux" / "lib"]
    names = [folder / "libcudart_static.a" for folder in folders]
    return next((name for name in names if name.exists()), None)


def arch_flags(archs: str) -> list[str]:
    """Return nvcc's flags for a list such as TORCH_CUDA_ARCH_LIST's, "8.0;9.0a+PTX".

    Raises:
        ValueError: an entry is not an architecture from 8.0 on.
    """
    flags = []
    for arch in re.split(r"[;, ]+", archs.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if found is None or int(found[1]) < 8:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0 or 9.0a+PTX, got {arch!r}"
            )
        number = found[1] + found[2] + found[3]
        kinds = [f"sm_{number}", f"compute_{number}"] if found[4] else [f"sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code=[{','.join(kinds)}]"]
    return flags


def compile_objects(folder: Path, sources: Sequence[Path]) -> list[str]:
    """Compile CUDA sources into a folder, in parallel; return the objects' paths."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHS
    objects, lines = [], []
    for source in sources:
        alone = "9.0a" if source.stem.startswith("kernels_sm90") else None
        if alone is not None and alone not in re.split(r"[;, ]+", archs.replace("+PTX", "")):
            continue
        made = str(folder / f"{source.stem}.o")
        objects.append(made)
        lines += [f"build {made}: nvcc {source.resolve()}"]
        lines += [f"  archs = {' '.join(arch_flags(alone or archs))}"]
    flags = FLAGS + (" -DLORA_SM90A" if any("kernels_sm90" in made for made in objects) else "")
    rule = RULE.format(nvcc=shutil.which("nvcc"), flags=flags)
    (folder / "build.ninja").write_text(rule + "\n".join(lines) + "\n")
    subprocess.run(["ninja", "-C", str(folder)], check=True, stdout=sys.stderr)
    return objects

"""How the CUDA part is compiled: by nvcc, called through ninja, beside any build of torch."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
# One fat binary; PTX of the oldest serves whatever is newer and not in the list. 10.0a's code runs
# on nothing else, so 10.3 has its own.
ARCHS = "8.0+PTX;8.6;8.9;9.0a;10.0a;10.3;12.0"
# Where ranges of architectures begin that one PTX serves: of sm_80's ptxas makes spills for sm_120.
_PTX_FROM = (80, 120)
# sm_90a's own instructions need its own.
_SM90A = "-gencode=arch=compute_90a,code=[sm_90a]"
_ARCH = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")
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

    PTX takes two thirds of the time of one architecture, so it is made once for each range of
    _PTX_FROM, whatever of it is in the list.

    Raises:
        ValueError: an entry is not an architecture from 8.0 on.
    """
    kinds: dict[int, list[str]] = {}
    with_ptx = set()
    for arch in entries(archs):
        found = _ARCH.fullmatch(arch)
        number = int(found[1] + found[2]) if found else 0
        if found is None or number < _PTX_FROM[0]:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0 or 9.0a+PTX, got {arch!r}"
            )
        start = max(first for first in _PTX_FROM if first <= number)
        kinds.setdefault(start, []).append(f"sm_{number}{found[3]}")
        if found[4]:
            with_ptx.add(start)
    for start in with_ptx:
        kinds[start].append(f"compute_{start}")
    return [f"-gencode=arch=compute_{start},code=[{','.join(kinds[start])}]" for start in kinds]


def entries(archs: str) -> list[str]:
    """Return the entries of a list of architectures."""
    return re.split(r"[;, ]+", archs.strip())


def compile_objects(folder: Path, sources: Sequence[Path]) -> list[str]:
    """Compile CUDA sources into a folder, in parallel; return the objects' paths."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHS
    objects, lines = [], []
    for source in sources:
        of_sm90a = source.stem.startswith("kernels_sm90")
        if of_sm90a and "9.0a" not in entries(archs.replace("+PTX", "")):
            continue
        made = str(folder / f"{source.stem}.o")
        objects.append(made)
        lines += [f"build {made}: nvcc {source.resolve()}"]
        lines += [f"  archs = {_SM90A if of_sm90a else ' '.join(arch_flags(archs))}"]
    flags = FLAGS + (" -DLORA_SM90A" if any("kernels_sm90" in made for made in objects) else "")
    rule = RULE.format(nvcc=shutil.which("nvcc"), flags=flags)
    (folder / "build.ninja").write_text(rule + "\n".join(lines) + "\n")
    subprocess.run(["ninja", "-C", str(folder)], check=True, stdout=sys.stderr)
    return objects

"""How the CUDA part is compiled: by nvcc, called through ninja, with torch's headers."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from csrc import toolchain
from csrc.toolchain import BuildError

HERE = Path(__file__).parent
# One fat binary; PTX of the oldest serves whatever is newer and not in the list. 10.0a's code runs
# on nothing else, so 10.3 has its own.
ARCHS = "8.0+PTX;8.6;8.9;9.0a;10.0a;10.3;12.0"
# As torch's own extensions understand them; too old ones are left out.
NAMES = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}
# What nvcc knows from a version on, for those that don't tell themselves.
KNOWN_FROM = {
    (12, 0): {80, 86, 87, 89, 90},
    (12, 8): {100, 101, 120},
    (12, 9): {103, 121},
    (13, 0): {88, 110},
}
LEAST_NVCC = 12, 5  # runtime.cu asks the driver for functions by version
# Where ranges of architectures begin that one PTX serves: of sm_80's ptxas makes spills for sm_120.
_PTX_FROM = (80, 120)
# sm_90a's own instructions need its own.
_SM90A = "-gencode=arch=compute_90a,code=[sm_90a]"
_ARCH = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")
FLAGS = (
    "-std=c++20 -O3 -lineinfo --expt-relaxed-constexpr --threads 0 "
    "-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
)
RULE = """
rule nvcc
  command = {nvcc} {flags} $archs -MD -MF $out.d -c $in -o $out
  description = nvcc $name
  depfile = $out.d
  deps = gcc
"""
STABLE_ABI_OF_TORCH_2_10 = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def left_out_reason() -> str | None:
    """Return why the CUDA part is not built, or None."""
    asked = os.environ.get("LORA_KERNELS_CUDA")
    if asked == "0":
        return "LORA_KERNELS_CUDA=0"
    if shutil.which("nvcc") is None:
        return "no nvcc on PATH"
    if (reason := toolchain.no_compiler_reason()) is not None:
        return reason
    if (version := nvcc_version()) < LEAST_NVCC:
        least, got = (".".join(map(str, numbers)) for numbers in (LEAST_NVCC, version))
        return f"nvcc: expected {least} or newer, got {got}"
    if shutil.which("ninja") is None:
        return "no ninja on PATH"
    if runtime_library() is None:
        return "no libcudart_static.a beside nvcc"
    try:
        import torch
    except ImportError:
        return "torch can't be imported by the build; use pip's --no-build-isolation"
    if torch.version.cuda is None and asked != "1":
        return f"torch {torch.__version__} can't use it; LORA_KERNELS_CUDA=1 builds it all the same"
    return None


def nvcc_version() -> tuple[int, int]:
    """Return nvcc's release; (0, 0) where it doesn't say one."""
    found = re.search(r"release (\d+)\.(\d+)", _nvcc_output("--version"))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def known_archs() -> set[int]:
    """Return the architectures that nvcc compiles for, as it lists them or by its version."""
    listed = re.findall(r"compute_(\d+)", _nvcc_output("--list-gpu-arch"))
    version = nvcc_version()
    by_version = (archs for first, archs in KNOWN_FROM.items() if first <= version)
    return set(map(int, listed)) or set().union(*by_version)


def _nvcc_output(option: str) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return ""
    done = subprocess.run([nvcc, option], capture_output=True, text=True)
    return "" if done.returncode else done.stdout


def runtime_library() -> Path | None:
    """Return CUDA's static runtime, which needs no CUDA build of torch."""
    nvcc = shutil.which("nvcc")
    dry_run = [nvcc, "--dryrun", "-x", "cu", os.devnull] if nvcc else ["false"]
    steps = subprocess.run(dry_run, capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.*)$", steps, re.MULTILINE)
    root = Path(found[1].strip()) if found else Path("/usr/local/cuda")
    folders = [root / "lib64", root / "lib", *root.glob("targets/*-linux/lib")]
    names = [folder / "libcudart_static.a" for folder in folders]
    return next((name for name in names if name.exists()), None)


def entries(archs: str) -> list[str]:
    """Return the entries of a list of architectures, names replaced by what they stand for."""
    names = [name for name in re.split(r"[;, ]+", archs) if name]
    return [entry for name in names for entry in NAMES.get(name, name).split(";")]


def usable(archs: str, known: Iterable[int]) -> list[str]:
    """Return the entries that can be compiled; the others are named and left out.

    9.0 is taken as 9.0a, whose instructions the kernels use.

    Raises:
        ValueError: an entry is not an architecture.
    """
    kept = []
    for arch in entries(archs):
        found = _ARCH.fullmatch(arch)
        if found is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0 or 9.0a+PTX, got {arch!r}"
            )
        number = int(found[1] + found[2])
        if number < _PTX_FROM[0] or number not in known:
            why = "the kernels need 8.0" if number < _PTX_FROM[0] else "nvcc doesn't know it"
            print(f"lora_kernels: left out architecture {arch}: {why}", file=sys.stderr)
            continue
        kept.append(re.sub(r"^9\.0(?!a)", "9.0a", arch))
    return list(dict.fromkeys(kept))


def arch_flags(archs: Sequence[str]) -> list[str]:
    """Return nvcc's flags for entries such as 8.0 or 9.0a+PTX.

    PTX takes two thirds of the time of one architecture, so it is made once for each range of
    _PTX_FROM, whatever of it is in the list.
    """
    kinds: dict[int, list[str]] = {}
    with_ptx = set()
    for arch in archs:
        major, minor, kind, ptx = _ARCH.fullmatch(arch).groups()
        number = int(major + minor)
        start = max(first for first in _PTX_FROM if first <= number)
        code = f"sm_{number}{kind}"
        if code not in kinds.setdefault(start, []):
            kinds[start].append(code)
        if ptx:
            with_ptx.add(start)
    for start in with_ptx:
        kinds[start].append(f"compute_{start}")
    return [f"-gencode=arch=compute_{start},code=[{','.join(kinds[start])}]" for start in kinds]


def wanted() -> str:
    """Return what is asked for, else the GPUs that torch sees here, else all that ship."""
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        return asked
    import torch

    seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    known = {entry.removesuffix("+PTX").rstrip("a"): entry for entry in ARCHS.split(";")}
    names = sorted(f"{major}.{minor}" for major, minor in seen)
    return ";".join(known.get(name, name) for name in names) or ARCHS


def compile_objects(folder: Path, sources: Sequence[Path]) -> list[str]:
    """Compile CUDA sources into a folder, in parallel; return the objects' paths.

    Raises:
        BuildError: they can't be compiled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        archs = usable(wanted(), known_archs())
    except ValueError as error:
        raise BuildError(str(error)) from error
    if not archs:
        raise BuildError("no architecture is left to compile for")
    objects, lines = [], []
    for source in sources:
        of_sm90a = "_sm90_" in source.stem
        if of_sm90a and not any(arch.startswith("9.0a") for arch in archs):
            continue
        made = str(folder / f"{source.stem}.o")
        objects.append(made)
        lines += [f"build {made}: nvcc {source.resolve()}", f"  name = {source.name}"]
        lines += [f"  archs = {_SM90A if of_sm90a else ' '.join(arch_flags(archs))}"]
    flags = FLAGS + (" -DLORA_SM90A" if any("_sm90_" in made for made in objects) else "")
    flags += " -Werror all-warnings" if toolchain.DEVELOPERS else ""
    rule = RULE.format(nvcc=shutil.which("nvcc"), flags=flags)
    (folder / "build.ninja").write_text(rule + "\n".join(lines) + "\n")
    print(f"lora_kernels: nvcc compiles for {' '.join(archs)}, minutes each", file=sys.stderr)
    if subprocess.run(["ninja", "-C", str(folder)], stdout=sys.stderr).returncode:
        raise BuildError("nvcc failed; its errors stand above")
    return objects


def build(folder: Path, target: Path) -> None:
    """Compile the part, and link it into `target`.

    Raises:
        BuildError: it can't be built.
    """
    from torch.utils.cpp_extension import include_paths

    # As system headers, so that warnings are of our own code alone.
    flags = [flag for path in include_paths() for flag in ("-isystem", path)]
    flags += ["-g0", STABLE_ABI_OF_TORCH_2_10]
    # The files that take minutes come first: no core waits for the last of them alone.
    sources = sorted(HERE.rglob("*.cu"), key=lambda source: ("linear" not in source.stem, source))
    kernels = compile_objects(folder / "kernels", sources)
    objects = toolchain.compile_sources(folder, sorted(HERE.rglob("*.cpp")), flags)
    objects += [*kernels, str(runtime_library())]
    toolchain.link(objects, target, folder, ["-lrt", "-ldl", "-lpthread"])

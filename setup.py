"""Says which extensions a build has; everything static stands in pyproject.toml.

LORA_KERNELS_CPU=0 and LORA_KERNELS_CUDA=0 leave a compiled part out, =1 makes its absence an error;
otherwise it is built where torch can be imported (pip: --no-build-isolation) and its compiler is on
PATH. TORCH_CUDA_ARCH_LIST names the GPUs to compile for. LORA_KERNELS_SANITIZE names what
`make sanitize` instruments the CPU part with.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path("csrc/cuda").resolve()))
import build as cuda

STABLE_ABI_OF_TORCH_2_10 = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def no_extension_reason() -> str | None:
    """Return why no compiled part can be built, or None."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler on PATH"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch can't be imported by the build; use pip's --no-build-isolation"
    return None


def left_out_reasons() -> dict[str, str]:
    """Return why each part is not built, for those that are not."""
    reasons = {
        "CPU": no_extension_reason(),
        "CUDA": no_extension_reason() or cuda.left_out_reason(),
    }
    if os.environ.get("LORA_KERNELS_CPU") == "0":
        reasons["CPU"] = "LORA_KERNELS_CPU=0"
    for part, reason in reasons.items():
        if reason and os.environ.get(f"LORA_KERNELS_{part}") == "1":
            raise SystemExit(f"lora_kernels: LORA_KERNELS_{part}=1, but {reason}")
    return {part: reason for part, reason in reasons.items() if reason}


def extension(part: str):
    """Return an extension on torch's stable ABI: one file for any Python."""
    from torch.utils.cpp_extension import CppExtension, include_paths

    # As system headers, so that warnings are errors in our own code alone.
    flags = [flag for path in include_paths() for flag in ("-isystem", path)]
    flags += ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    links = []
    sanitizers = os.environ.get("LORA_KERNELS_SANITIZE")
    if part == "cpu" and sanitizers:
        # At -O1 reports name the line; aborting on the first makes a test fail.
        links = [f"-fsanitize={sanitizers}"]
        flags += [*links, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    sources = sorted(str(path) for path in Path("csrc", part).glob("*.cpp"))
    made = CppExtension(
        f"lora_kernels._{part}",
        sources,
        extra_compile_args=[*flags, STABLE_ABI_OF_TORCH_2_10],
        extra_link_args=links,
        py_limited_api=True,
    )
    made.include_dirs = []
    if part == "cuda":
        made.libraries += ["rt", "dl", "pthread"]
    return made


def build_arguments(parts: list[str]) -> dict:
    """Return setup's arguments for the parts that are built."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext):
            if ext.name.endswith("_cuda"):
                sources = sorted(Path("csrc/cuda").glob("*.cu"))
                ext.extra_objects = cuda.compile_objects(Path(self.build_temp, "cuda"), sources)
                ext.extra_objects.append(str(cuda.runtime_library()))
            super().build_extension(ext)

    command = Build.with_options(use_ninja=shutil.which("ninja") is not None)
    return {
        "ext_modules": [extension(part) for part in parts],
        "cmdclass": {"build_ext": command},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


reasons = left_out_reasons()
built = [part for part in ("CPU", "CUDA") if part not in reasons]
# pip shows these lines with -v; `python -m lora_kernels info` says the same of what is installed.
for part in ("CPU", "CUDA"):
    said = f"out the {part} part: {reasons[part]}" if part in reasons else f" the {part} part"
    print(f"lora_kernels: built with{said}", file=sys.stderr)
setup(**(build_arguments([part.lower() for part in built]) if built else {}))

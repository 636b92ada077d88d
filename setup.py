"""Says which extension a build has; everything static stands in pyproject.toml.

LORA_KERNELS_CPU=0 leaves the compiled CPU part out, =1 makes its absence an error; otherwise it is
built where torch can be imported (pip: --no-build-isolation) and a C++ compiler is on PATH.
LORA_KERNELS_SANITIZE names what `make sanitize` instruments the part with.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

STABLE_ABI_OF_TORCH_2_10 = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def left_out_reason() -> str | None:
    """Return why the compiled part is not built, or None."""
    if os.environ.get("LORA_KERNELS_CPU") == "0":
        return "LORA_KERNELS_CPU=0"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler on PATH"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch can't be imported by the build; use pip's --no-build-isolation"
    return None


def extension_arguments() -> dict:
    """Return setup's arguments for the extension on torch's stable ABI: one file for any Python."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    # As system headers, so that warnings are errors in our own code alone.
    system = [flag for path in include_paths() for flag in ("-isystem", path)]
    flags = ["-O3", "-g0", "-std=c++20", "-Wall", "-Wextra", "-Werror", STABLE_ABI_OF_TORCH_2_10]
    links = []
    if sanitizers := os.environ.get("LORA_KERNELS_SANITIZE"):
        # At -O1 reports name the line; aborting on the first makes a test fail.
        instrumented = f"-fsanitize={sanitizers}"
        flags += [instrumented, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
        links = [instrumented]
    extension = CppExtension(
        "lora_kernels._cpu",
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        extra_compile_args=[*system, *flags],
        extra_link_args=links,
        py_limited_api=True,
    )
    extension.include_dirs = []
    return {
        "ext_modules": [extension],
        "cmdclass": {
            "build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)
        },
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


reason = left_out_reason()
if reason and os.environ.get("LORA_KERNELS_CPU") == "1":
    raise SystemExit(f"lora_kernels: LORA_KERNELS_CPU=1, but {reason}")
# pip shows this line with -v; `python -m lora_kernels info` says the same of an installed package.
parts = f"without the compiled CPU part: {reason}" if reason else "with the compiled CPU part"
print(f"lora_kernels: built {parts}; no CUDA part in this version", file=sys.stderr)
setup(**({} if reason else extension_arguments()))

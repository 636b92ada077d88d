"""Says which extensions a build has; everything static stands in pyproject.toml.

LORA_KERNELS_CPU=0 and LORA_KERNELS_CUDA=0 leave a compiled part out, =1 makes its absence an error;
otherwise what can't be built is left out, with its reason. The others stand in docs/environment.md.
"""

import json
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from csrc.cpu import build as cpu
from csrc.cuda import build as cuda
from csrc.toolchain import BuildError

PARTS = {"cpu": cpu, "cuda": cuda}
# Why each part is absent that is: `python -m lora_kernels info` says the same.
REASONS: dict[str, str] = {}


def leave_out(part: str, reason: str) -> None:
    """Go on without a part, or end where it was asked for."""
    variable = f"LORA_KERNELS_{part.upper()}"
    if os.environ.get(variable) == "1":
        raise SystemExit(f"lora_kernels: {variable}=1, but {reason}")
    REASONS[part] = reason
    print(f"lora_kernels: built without the {part.upper()} part: {reason}", file=sys.stderr)


def record(command) -> None:
    """Keep the reasons beside the package's modules."""
    in_place = command.editable_mode or getattr(command, "inplace", False)
    folder = Path("lora_kernels") if in_place else Path(command.build_lib, "lora_kernels")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_left_out.json").write_text(json.dumps(REASONS))


class BuildModules(build_py):
    """Also says which parts nobody will try to build."""

    def run(self):
        """Copy the modules."""
        super().run()
        record(self)


class BuildParts(build_ext):
    """Builds the parts; setuptools only says where they go."""

    def run(self):
        """Build them all."""
        super().run()
        record(self)

    def build_extension(self, ext):
        """Build one, or leave it out."""
        part = ext.name.rpartition("_")[2]
        target = Path(self.get_ext_fullpath(ext.name))
        print(f"lora_kernels: building the {part.upper()} part", file=sys.stderr)
        try:
            PARTS[part].build(Path(self.build_temp, part).resolve(), target)
        except BuildError as error:
            target.unlink(missing_ok=True)
            leave_out(part, str(error))
        else:
            print(f"lora_kernels: built with the {part.upper()} part", file=sys.stderr)


for name, module in PARTS.items():
    if (why := module.left_out_reason()) is not None:
        leave_out(name, why)
planned = [name for name in PARTS if name not in REASONS]
setup(
    # On torch's stable ABI, without Python's: one file for any Python.
    ext_modules=[
        Extension(f"lora_kernels._{part}", [], py_limited_api=True, optional=True)
        for part in planned
    ],
    cmdclass={"build_ext": BuildParts, "build_py": BuildModules},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if planned else {},
)

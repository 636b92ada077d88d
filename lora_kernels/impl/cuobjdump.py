"""NVIDIA's cuobjdump, which Triton's wheel carries: what a file of compiled kernels holds."""

import subprocess
from importlib.util import find_spec
from pathlib import Path


def cuobjdump(option: str, file: Path) -> str:
    """Return what the program says of a cubin or a library, such as for "-res-usage" or "-sass".

    Raises:
        RuntimeError: triton is not installed.
    """
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        raise RuntimeError("cuobjdump comes with triton, which is not installed")
    program = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(program), option, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

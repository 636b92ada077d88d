"""Check an installed package beside the torch that is there: its CPU part against the oracle.

    python tests/installed.py

It needs nothing but both, so that cibuildwheel runs it on a wheel, too.
"""

import itertools
import platform
import sys
from pathlib import Path

import torch

import lora_kernels
from lora_kernels.native import absence
from lora_kernels.testing import Case, assert_parity, make_inputs

SIZES = [(1, 64, 64, 1), (16, 96, 200, 8), (130, 257, 129, 16), (300, 320, 512, 64)]
DTYPES = [
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float32, None),
]


def main() -> str | None:
    """Check every case; return why the part is absent, or None."""
    where = f"{Path(lora_kernels.__file__).parent}, torch {torch.__version__}"
    where += f", Python {platform.python_version()} on {platform.machine()}"
    if (reason := absence("cpu")) is not None:
        return f"{where}: compiled CPU part {reason}"
    cases = [
        Case((m,), n, k, r, dtype, adapters, p)
        for (m, n, k, r), (dtype, adapters), p in itertools.product(SIZES, DTYPES, (0.0, 0.1))
    ]
    for seed, case in enumerate(cases):
        torch.manual_seed(seed)
        assert_parity(case, make_inputs(case), "cpu")
    isa = torch.ops.lora_kernels.cpu_isa()
    print(f"{where}: {len(cases)} cases within the budget by {isa} kernels")
    return None


if __name__ == "__main__":
    sys.exit(main())

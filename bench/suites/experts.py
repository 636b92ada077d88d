"""Blocks of a mixture's experts, forward and backward, by PEFT and by others; on a CPU.

    python -m bench.suites.experts --shapes qwen3 --dtype fp32

Sizes are small relatives of known models'; how they are measured: `bench.measure.beside_peft`.
"""

import sys

from bench.measure.beside_peft import Suite
from bench.providers.experts import LABELS, Call, ExpertsCase

# Limits are those of one thread.
SUITE = Suite(
    (
        (ExpertsCase("qwen3", 64, 8, 512, 192, 512, "fp32"), 0.29, 0.45),
        (ExpertsCase("qwen3, many rows", 64, 8, 512, 192, 2048, "fp32"), 0.42, 0.64),
        (ExpertsCase("qwen3, few rows", 64, 8, 512, 192, 16, "fp32"), 0.12, 0.23),
        (ExpertsCase("gpt-oss", 32, 4, 720, 720, 512, "fp32", kind="gpt-oss"), 0.30, 0.32),
        (ExpertsCase("mixtral", 8, 2, 512, 1792, 1024, "fp32"), 0.32, 0.62),
    ),
    Call,
    LABELS,
)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and return an exit status."""
    return SUITE.main("python -m bench.suites.experts", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())

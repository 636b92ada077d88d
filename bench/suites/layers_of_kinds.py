"""DoRA, embeddings and convolutions, forward and backward, by PEFT and by us; on a CPU.

    python -m bench.suites.layers_of_kinds --shapes dora conv --dtype fp32

How they are measured: `bench.measure.beside_peft`.
"""

import sys

from bench.measure.beside_peft import Suite
from bench.providers.kinds import LABELS, Call, KindCase

# Limits are those of one thread, with PEFT's float32 adapters; for float32 weights none was set.
SUITE = Suite(
    (
        (KindCase("dora", "dora", 512, 2048, 2048), None, 0.38),
        (KindCase("dora", "dora", 512, 2048, 2048, p=0.05), None, 0.60),
        (KindCase("dora", "dora", 2048, 1024, 1024), None, 0.76),
        (KindCase("dora, few rows", "dora", 64, 2048, 2048), None, 0.18),
        (KindCase("embedding", "embedding", 2048, 2048, 32000), None, 0.20),
        (KindCase("conv 1x1", "conv", 4, 320, 640, size=32), None, 0.82),
        (KindCase("conv 1x1", "conv", 4, 320, 640, p=0.05, size=32), None, 0.50),
        (KindCase("conv 3x3", "conv", 4, 320, 320, size=32, kernel=3), None, 1.00),
        (KindCase("conv 3x3", "conv", 4, 320, 320, p=0.05, size=32, kernel=3), None, 0.94),
    ),
    Call,
    LABELS,
)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and return an exit status."""
    return SUITE.main("python -m bench.suites.layers_of_kinds", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())

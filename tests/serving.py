"""Which implementations a test may ask for here, with visible skips where one doesn't serve."""

import pytest
import torch

from lora_kernels.dispatch import IMPLEMENTATIONS, Problem, refusals

# A GPU's kernels have parity tests of their own, where something can run them.
IMPLS = [i.name for i in IMPLEMENTATIONS if i.name not in ("triton", "cuda")]


def skip_if_refused(impl, dtype=torch.float32, r=16):
    """Skip what an implementation says it doesn't serve; "auto" goes on to the next."""
    reason = refusals(Problem(torch.device("cpu"), dtype, r, True)).get(impl)
    if reason is not None:
        pytest.skip(f"{impl}: {reason}")

"""Which implementations a test may ask for here, with visible skips where one doesn't serve."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from lora_kernels.dispatch import IMPLEMENTATIONS, refusals
from lora_kernels.operands.request import Request

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
# A GPU's kernels have parity tests of their own, where something can run them.
IMPLS = [i.name for i in IMPLEMENTATIONS if i.name not in ("triton", "cuda")]


class Place(NamedTuple):
    """Where kernels run: `make` returns what runs them, on tensors of the device `memory`."""

    memory: str
    make: Callable[..., Any]

    def __call__(self, **how: Any) -> Any:
        return self.make(**how)


def skip_if_refused(impl, dtype=torch.float32, r=16, device="cpu"):
    """Skip what an implementation says it doesn't serve; "auto" goes on to the next."""
    reason = refusals(Request(torch.device(device), dtype, r, True)).get(impl)
    if reason is not None:
        pytest.skip(f"{impl}: {reason}")

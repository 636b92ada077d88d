"""Which implementations a test may ask for here, with visible skips where one doesn't serve."""

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from lora_kernels.dispatch import IMPLEMENTATIONS, refusal
from lora_kernels.native import absence
from lora_kernels.operands.call import Adapter, LinearCall
from lora_kernels.operands.dropout import Dropout
from lora_kernels.operands.request import Request
from lora_kernels.operands.weight import Dense

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_compiled_machine = pytest.mark.skipif(
    absence("cuda") is not None
    or shutil.which("nvcc") is None
    or importlib.util.find_spec("ptxvm") is None,
    reason="needs the compiled CUDA part, nvcc and the PTX virtual machine (module ptxvm)",
)
# A GPU's kernels have parity tests of their own, where something can run them.
IMPLS = [i.name for i in IMPLEMENTATIONS if i.name not in ("triton", "cuda")]


class Place(NamedTuple):
    """Where kernels run: `make` returns what runs them, on tensors of the device `memory`."""

    memory: str
    make: Callable[..., Any]

    def __call__(self, **how: Any) -> Any:
        return self.make(**how)


def linear_call(weight, a, b, bias=None, seed=None, scaling=1.0, threshold=0):
    """Return the call of a dense weight; a seed or none, and its threshold."""
    dropout = None if seed is None else Dropout(seed, threshold)
    return LinearCall(Dense(weight), Adapter(a, b, scaling), bias, dropout)


def skip_if_refused(impl, dtype=torch.float32, r=16, device="cpu", op="lora_linear"):
    """Skip what an implementation says it doesn't serve; "auto" goes on to the next."""
    request = Request(op, torch.device(device), dtype, r, True)
    reason = None if impl == "auto" else refusal(impl, request)
    if reason is not None:
        pytest.skip(f"{impl}: {reason}")

"""Where the compiled CUDA kernels run in tests: their PTX in a virtual machine, or a GPU."""

import importlib.util
from contextlib import nullcontext

import pytest

from lora_kernels.impl.cuda.tools.machine import Machine
from lora_kernels.impl.executor import using
from lora_kernels.native import absence
from tests.support.implementations import Place, needs_gpu

ABSENT = absence("cuda")
needs_part = pytest.mark.skipif(ABSENT is not None, reason=f"compiled CUDA part: {ABSENT}")
needs_machine = pytest.mark.skipif(
    importlib.util.find_spec("ptxvm") is None or importlib.util.find_spec("triton") is None,
    reason="needs the PTX virtual machine (module ptxvm on PYTHONPATH) and Triton's cuobjdump",
)
A100, RTX3090 = 166912, 101376  # bytes of shared memory: each takes other shapes of tiles

EXECUTORS = [
    pytest.param(
        Place("cpu", lambda **how: using(Machine(**how))), id="sm_80", marks=needs_machine
    ),
    pytest.param(Place("cuda", lambda **how: nullcontext()), id="gpu", marks=needs_gpu),
]

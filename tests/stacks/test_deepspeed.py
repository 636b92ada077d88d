"""DeepSpeed ZeRO-1 to ZeRO-3 in two processes on the CPU: gradients are those of one process."""

import importlib.util

import pytest
import torch

from tests.stacks.processes import run_cases

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

CASES = [
    *("ZeRO-1", "ZeRO-2", "ZeRO-3, PEFT's forward", "ZeRO-3, leaf modules"),
    *("ZeRO-1, adapter files", "ZeRO-3, adapter files"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Deepspeed is imported in the two processes only: it looks for accelerators and logs."""
    seed = torch.initial_seed() % 2**31
    return run_cases("deepspeed_cases", tmp_path_factory.mktemp("processes"), seed)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_as_one_process(case, results):
    error = results.get(case, "not run, since an earlier case failed")
    assert error is None, error

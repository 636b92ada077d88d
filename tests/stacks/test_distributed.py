"""DDP, FSDP2 and tensor parallelism in two processes: gradients are those of one process."""

import pytest
import torch

from tests.stacks.processes import run_cases

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)
from tests.stacks.distributed_cases import CASES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The two processes run all cases one after the other: starting them is what takes time."""
    seed = torch.initial_seed() % 2**31
    return run_cases("distributed_cases", tmp_path_factory.mktemp("processes"), seed)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case, results):
    error = results.get(case, "not run, since an earlier case failed")
    assert error is None, error

"""Adapter files of models that two processes share: DDP, FSDP of both kinds, tensor parallelism."""

import pytest
import torch

from tests.stacks.processes import run_cases

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)
from tests.stacks.adapter_shard_cases import CASES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The two processes run all cases one after the other: starting them is what takes time."""
    seed = torch.initial_seed() % 2**31
    return run_cases("adapter_shard_cases", tmp_path_factory.mktemp("processes"), seed)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_files_are_those_of_the_whole_model(case, results):
    error = results.get(case, "not run, since an earlier case failed")
    assert error is None, error

"""What tests of planted faults share."""

import itertools

import pytest
import torch

from lora_kernels.impl import executor
from lora_kernels.impl.cuda.tools import machine
from lora_kernels.impl.cuda.tools.machine import Machine
from lora_kernels.impl.executor import using
from lora_kernels.testing import assert_parity, assert_results, make_inputs, run
from tests.support.cuda_mutations import WIDE_KERNELS, mutated_ptx


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs the parity suite of a case on mutated kernels; all but "nothing" must turn it red.

    residents: numbers of running programs; tickets order tiles, so that not every fault meets each.
    """

    def check_one(name, case, kernels, mutants, residents, target="sm_80", **device):
        code = executor.load(mutated_ptx(tmp_path, kernels, mutants[name], target))
        monkeypatch.setattr(machine, "_code", lambda target: code)

        # Where no tile of dA draws the mask, those of dx wait for dxa alone; without dx other tiles
        # make it, instead of sm_90a's and of wide ones those of kernels that aren't compiled here.
        others = target == "sm_90a" or kernels == WIDE_KERNELS
        subsets = [("dx",)] if others else [("dx",), ("da", "db")]

        def suite():
            zeros = torch.zeros(256, dtype=torch.int32)
            for resident, seed in itertools.product(residents, range(3)):
                with using(Machine(resident=resident, seed=seed, zeros=zeros, **device)):
                    assert_parity(case, make_inputs(case), "cuda")
                    for wanted in subsets:
                        inputs = make_inputs(case)
                        assert_results(case, inputs, run(case, inputs, "cuda", wanted), "cuda")
                assert not zeros.any()

        if name == "nothing":
            suite()
        else:
            with pytest.raises((AssertionError, RuntimeError)) as found:
                suite()
            assert "no kernel named" not in str(found.value)

    return check_one

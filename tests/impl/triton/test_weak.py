"""The order of memory in the Triton kernels, as the PTX ISA promises it, and no more.

Faults are planted in the compiled code; the virtual machine's weak mode must find each.
"""

import re

import pytest
import torch

from lora_kernels.impl import executor
from lora_kernels.testing import DORA, Case, DoraCase, assert_parity, make_inputs
from tests.support.executors import Machine, fixed_plan, needs_machine, running

pytestmark = needs_machine
CASE = Case((130,), 136, 136, 16, torch.bfloat16, dropout_p=0.1)
# target, what stands in the code, what instead
FAULTS = {
    "nothing": (80, r"release", "release"),
    "published without release": (80, r"atom\.global\.gpu\.release", "atom.global.gpu.relaxed"),
    "published to the program alone": (80, r"gpu\.release\.add", "cta.release.add"),
    "waited without acquire": (80, r"ld\.acquire\.gpu", "ld.relaxed.gpu"),
    "waited for the program alone": (80, r"ld\.acquire\.gpu", "ld.acquire.cta"),
    "left without release": (80, r"atom\.acq_rel\.gpu\.global", "atom.relaxed.gpu.global"),
    "nothing of sm_90": (90, r"release", "release"),
    "no fence between proxies": (90, r"fence\.proxy\.async[\w.:]*;", ""),
}


# What DoRA's norms have alone is waited for where xa has a launch of its own.
NORM_CASE = DoraCase((70,), 136, 136, 16, torch.bfloat16)
NORM_FAULTS = ["nothing", "published without release", "waited without acquire"]


@pytest.mark.many
@pytest.mark.parametrize("name", FAULTS)
def test_a_missing_order_is_found(name):
    _check(name, 2, lambda: assert_parity(CASE, make_inputs(CASE), "triton"))


@pytest.mark.many
@pytest.mark.parametrize("name", NORM_FAULTS)
def test_a_missing_order_of_norms_is_found(name):
    _check(name, 0, lambda: DORA.assert_parity(NORM_CASE, DORA.inputs(NORM_CASE), "triton"))


def _check(name, xa_columns, call):
    target, right, wrong = FAULTS[name]
    changed = 0

    def load(ptx):
        nonlocal changed
        text, count = re.subn(right, wrong, ptx)
        changed += count
        return executor.load(text)

    plan = fixed_plan(xa_columns=xa_columns, descriptors=target > 80)

    def suite():
        for seed in range(3):
            with running(Machine(target, 6, seed, weak=1, plan=plan, load=load)):
                call()

    if name.startswith("nothing"):
        suite()
    else:
        with pytest.raises(AssertionError, match=r"race|budget|NaN|order|proxy"):
            suite()
    assert changed

"""The order of memory in the Triton kernels, as the PTX ISA promises it, and no more.

Faults are planted in the compiled code; the virtual machine's weak mode must find each.
"""

import re

import pytest
import torch

from lora_kernels.impl import executor
from lora_kernels.testing import Case, assert_parity, make_inputs
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


@pytest.mark.many
@pytest.mark.parametrize("name", FAULTS)
def test_a_missing_order_is_found(name):
    target, right, wrong = FAULTS[name]
    changed = 0

    def load(ptx):
        nonlocal changed
        text, count = re.subn(right, wrong, ptx)
        changed += count
        return executor.load(text)

    plan = fixed_plan(xa_columns=2, descriptors=target > 80)

    def suite():
        for seed in range(3):
            with running(Machine(target, 6, seed, weak=1, plan=plan, load=load)):
                assert_parity(CASE, make_inputs(CASE), "triton")

    if name.startswith("nothing"):
        suite()
    else:
        with pytest.raises(AssertionError, match=r"race|budget|NaN|order|proxy"):
            suite()
    assert changed

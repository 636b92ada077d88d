"""The order of memory in the compiled CUDA kernels, and waits without end.

The virtual machine's weak mode orders memory by what the PTX ISA promises alone. Faults are planted
in the PTX of a few small kernels, which is compiled here once.
"""

import re
from functools import cache
from itertools import product

import pytest
import torch

from lora_kernels.impl import executor
from lora_kernels.impl.cuda.tools import machine
from lora_kernels.impl.cuda.tools.machine import Machine
from lora_kernels.impl.executor import using
from lora_kernels.testing import Case, assert_parity, make_inputs, run
from tests.impl.cuda.test_mutations import MUTANTS
from tests.support.cuda_mutations import BF16_KERNELS, HOPPER_KERNELS, mutated_ptx
from tests.support.implementations import needs_compiled_machine

pytestmark = needs_compiled_machine
# Each target's kernels, a case that they serve, what the machine is, and how literally it reads:
# at level 2 an arrival by copies orders nothing but these copies.
TARGETS = {
    "sm_80": (
        BF16_KERNELS,
        Case((130,), 72, 360, 8, torch.bfloat16, dropout_p=0.1),
        {"resident": 8, "multiprocessors": 18, "weak": 1},
    ),
    "sm_90a": (
        HOPPER_KERNELS,
        Case((400,), 256, 520, 8, torch.bfloat16, dropout_p=0.1),
        {"arch": 90, "shared_bytes": 232448, "resident": 5, "multiprocessors": 9, "weak": 2},
    ),
}
PASSED_ON = "arrive(memory.factors_filled(), one);"
FAULTS = {
    "published without release": ("red.release.gpu", "red.relaxed.gpu"),
    "published to the program alone": ("red.release.gpu", "red.release.cta"),
    "waited without acquire": ("ld.acquire.gpu", "ld.relaxed.gpu"),
    "waited for the program alone": ("ld.acquire.gpu", "ld.acquire.cta"),
    "left without release": ("atom.acq_rel.gpu", "atom.relaxed.gpu"),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """PTX by target and change of the source, compiled once."""

    @cache
    def text(target, mutant=MUTANTS["nothing"]):
        return mutated_ptx(tmp_path_factory.mktemp("few"), TARGETS[target][0], mutant, target)

    return text


def _check(monkeypatch, code, target, seeds=(0,), **how):
    monkeypatch.setattr(machine, "_code", lambda target: code)
    _, case, device = TARGETS[target]
    for seed in seeds:
        with using(Machine(seed=seed, **(device | how))):
            assert_parity(case, make_inputs(case), "cuda")


@pytest.mark.many
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_read_is_ordered(target, compiled, monkeypatch):
    _check(monkeypatch, executor.load(compiled(target)), target, range(4))


@pytest.mark.parametrize(("target", "fault"), list(product(TARGETS, FAULTS)))
def test_a_missing_order_is_found(target, fault, compiled, monkeypatch):
    right, wrong = FAULTS[fault]
    text = compiled(target)
    assert right in text
    with pytest.raises(AssertionError, match=r"race|budget|NaN|order"):
        _check(monkeypatch, executor.load(text.replace(right, wrong)), target, range(4))


def test_what_only_copies_arrive_for_is_found(compiled, monkeypatch):
    """Who reads the mask of other programs on sm_90a has it from a thread that waited for them."""
    fault = (
        "sm90/pipeline.cuh",
        PASSED_ON,
        "if (one) arrive_after_copies(memory.factors_filled());",
    )
    code = executor.load(compiled("sm_90a", fault))
    with pytest.raises(AssertionError, match=r"race|budget|NaN|order"):
        _check(monkeypatch, code, "sm_90a", range(8))


@pytest.mark.parametrize("target", TARGETS)
def test_a_wait_without_end_ends_by_an_error(target, compiled, monkeypatch):
    """A flag that a broken launch left behind is never reached; the clock counts instructions."""
    import ptxvm

    text, limits = re.subn(r"(setp\.gt\.u32 late, %r\d+, )7;", r"\g<1>1000000;", compiled(target))
    assert limits
    code = ptxvm.load(text.replace("%globaltimer_hi", "%globaltimer_lo"))
    _check(monkeypatch, code, target, weak=0)
    _, case, device = TARGETS[target]
    flags = torch.zeros(4096, dtype=torch.int32)
    flags[0] = -99
    with (
        using(Machine(zeros=flags, **(device | {"weak": 0}))),
        pytest.raises(Exception, match="trap executed"),
    ):
        run(case, make_inputs(case), "cuda")

"""Fuzzing: parameters of a live patched layer changed in every way, against PEFT's own layer.

An unpatched deep copy gets the same changes, before forward and between forward and backward. Both
raise, or both give the same; where a change makes torch itself read beyond memory, ours raises.
LORA_KERNELS_FUZZ=10000 sets the number of cases; LORA_KERNELS_TEST_SEED, printed, repeats them.
"""

import contextlib
import copy
import random

import pytest
import torch
from peft.tuners.lora import Linear
from torch import nn

import lora_kernels as lk
from tests.stacks.live_changes import (
    DTYPES,
    FORMS,
    OTHERS,
    RANKS,
    TARGETS,
    TORN,
    Live,
    change,
    numbers,
    owners,
)
from tests.stacks.live_comparison import check, outcome, run_cases
from tests.stacks.models import peft
from tests.stacks.test_fuzz import CASES

SIZES = (1, 2, 8, 16, 17, 48, 64)


def random_change(rng):
    """Return one change: of a parameter, of the rank, or of something else."""
    kind = rng.choice(["parameter"] * 4 + ["rank", "other"])
    if kind == "parameter":
        return rng.choice(TARGETS), rng.choice([*FORMS, *OTHERS])
    if kind == "rank":
        return "rank", rng.choice(RANKS)
    return rng.choice(["scaling", "dropout", "swap"]), ""


def random_case(rng):
    """Return a case; where backward would read beyond memory, nothing else is changed."""
    torn = [(rng.choice(("weight", "lora_A", "lora_B")), rng.choice(TORN))]
    between = rng.choice([[], [random_change(rng)], [random_change(rng)], torn])
    changes = [rng.choice([random_change(rng)] * 4 + [("x", "")]) for _ in range(rng.randrange(3))]
    torn_before = [(rng.choice(TARGETS), rng.choice(TORN))]
    before = rng.choice([changes] * 6 + [torn_before, [("scaling", "emptied")]])
    return Live(
        rows=rng.choice([1, 3, 5, 64]),
        n=rng.choice(SIZES),
        k=rng.choice(SIZES),
        r=rng.choice([1, 2, 8, 17]),
        dims=rng.randint(1, 3),
        dtype=rng.choice(DTYPES),
        adapter_dtype=rng.choice([None, None, torch.float32]),
        bias=rng.random() < 0.5,
        lora_bias=rng.random() < 0.5,
        impl=rng.choice(["auto", "auto", "auto", "auto", "eager", "reference"]),
        prepacked=rng.random() < 0.5,
        mode=rng.choice(["backward", "backward", "grad", "no_grad"]),
        autocast=between is not torn and rng.random() < 0.25,
        before=[] if between is torn else before,
        between=between,
        seed=rng.randrange(1 << 31),
    )


def models_of(case):
    """Return a patched model and an unpatched copy of it."""
    rng = random.Random(case.seed)
    base = nn.Linear(case.k, case.n, bias=case.bias)
    config = peft.LoraConfig(r=case.r, lora_alpha=2 * case.r, lora_dropout=0.1)
    config.lora_bias = case.lora_bias
    layer = Linear(base, "default", config, r=case.r, lora_alpha=2 * case.r)
    layer.lora_dropout["default"].p = 0.0
    for name, (owner, which) in owners(layer).items():
        parameter = getattr(owner, which)
        if parameter is not None:
            dtype = case.dtype if name in ("weight", "bias") else case.adapter_dtype or case.dtype
            parameter.data = numbers(parameter.shape, rng, dtype)
            parameter.requires_grad_(name.startswith("lora"))
    model = nn.Sequential(layer)
    patched = copy.deepcopy(model)
    assert len(lk.patch_peft(patched, impl=case.impl).patched) == 1
    if case.prepacked:
        lk.prepack_(patched)
    return patched, model


def results_of(case, model):
    """Return what a model gives after the case's changes: y and the gradients, or the exception."""
    rng, layer = random.Random(case.seed + 1), model[0]
    shape = {1: (case.k,), 2: (case.rows, case.k), 3: (case.rows, 2, case.k)}[case.dims]
    x = numbers(shape, rng, case.dtype).requires_grad_(rng.random() < 0.7)
    for what in case.before:
        with contextlib.suppress(Exception):  # a change that torch refuses isn't made
            x = change(case, layer, x, what, rng)
    return outcome(
        case, lambda: model(x), {"x": x}, lambda: owners(layer),
        lambda what: change(case, layer, x, what, rng), rng,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_changed_layers_are_pefts_or_say_no():
    run_cases("live", CASES, random_case, lambda case: check(case, models_of, results_of))

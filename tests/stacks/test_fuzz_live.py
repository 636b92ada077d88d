"""Fuzzing: parameters of a live patched layer changed in every way, against PEFT's own layer.

An unpatched deep copy gets the same changes, before forward and between forward and backward. Both
raise, or both give the same; where a change makes torch itself read beyond memory, ours raises.
LORA_KERNELS_FUZZ=10000 sets the number of cases; LORA_KERNELS_TEST_SEED, printed, repeats them.
"""

import contextlib
import copy
import random

import hypothesis
import torch
from hypothesis import strategies as st
from peft.tuners.lora import Linear
from torch import nn

import lora_kernels as lk
from tests.conftest import SEED
from tests.stacks.live_changes import (
    DTYPES,
    FORMS,
    RANKS,
    TARGETS,
    TORN,
    Live,
    change,
    numbers,
    owners,
)
from tests.stacks.models import peft
from tests.stacks.test_fuzz import CASES, settings


def changes():
    """Return a strategy of one change."""
    parameter = st.tuples(
        st.sampled_from(TARGETS),
        st.sampled_from([*FORMS, "shape", "shape", "requires_grad", "none", "deleted"]),
    )
    rank = st.tuples(st.just("rank"), st.sampled_from(RANKS))
    other = st.sampled_from([(name, "") for name in ("scaling", "dropout", "swap")])
    return st.one_of(parameter, parameter, parameter, parameter, rank, other)


sizes = st.sampled_from([1, 2, 8, 16, 17, 48, 64])
lives = st.builds(
    Live,
    rows=st.sampled_from([1, 3, 5, 64]),
    n=sizes,
    k=sizes,
    r=st.sampled_from([1, 2, 8, 17]),
    dims=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from([None, None, torch.float32]),
    bias=st.booleans(),
    lora_bias=st.booleans(),
    impl=st.sampled_from(["auto", "auto", "auto", "auto", "eager", "reference"]),
    prepacked=st.booleans(),
    mode=st.sampled_from(["backward", "backward", "grad", "no_grad"]),
    autocast=st.sampled_from([False, False, False, True]),
    before=st.one_of(
        st.lists(
            st.one_of(changes(), st.just(("x", ""))),
            max_size=2,
        ),
        st.tuples(st.sampled_from(TARGETS), st.sampled_from(TORN)).map(lambda one: [one]),
        st.just([("scaling", "emptied")]),
    ),
    between=st.one_of(
        st.just([]),
        st.lists(changes(), min_size=1, max_size=1),
        st.tuples(st.sampled_from(["weight", "lora_A", "lora_B"]), st.sampled_from(TORN)).map(
            lambda one: [one]
        ),
    ),
    seed=st.integers(0, 2**31),
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
    grad = torch.no_grad() if case.mode == "no_grad" else contextlib.nullcontext()
    found = {}
    try:
        with grad, torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            found["y"] = y = model(x)
        if case.mode == "backward":
            for what in case.between:
                with contextlib.suppress(Exception):
                    change(case, layer, x, what, rng)
            y.backward(numbers(y.shape, rng, y.dtype))
            found["x"] = x.grad
            for name, (owner, which) in owners(layer).items():
                found[name] = getattr(getattr(owner, which, None), "grad", None)
    except Exception as error:
        found["error"] = error
    return found


def assert_alike(ours, theirs, share, what):
    """Compare two results: kind, dtype, shape, device, and numbers by the dtype's tolerance."""
    assert (ours is None) == (theirs is None), what
    if ours is None:
        return
    for name in ("dtype", "device", "layout", "requires_grad", "shape"):
        if name == "shape" and theirs.is_nested:
            continue  # each has a symbol of its own
        assert getattr(ours, name) == getattr(theirs, name), (what, name)
    assert type(ours) is type(theirs), what
    if (
        ours.is_meta
        or ours.layout is not torch.strided
        or ours.is_nested
        or ours.numel() == 0
        or share > 1
    ):
        return
    ours, theirs = ours.detach().as_subclass(torch.Tensor), theirs.detach()
    finite = theirs[theirs.isfinite()].abs()
    largest = max(1.0, finite.max().item() if finite.numel() else 0.0)
    torch.testing.assert_close(
        ours,
        theirs.as_subclass(torch.Tensor),
        rtol=0,
        atol=share * largest,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def is_torn(case):
    """Whether forward or backward would read beyond a parameter's memory in torch itself."""
    after = case.between if case.mode == "backward" else []
    return any(how in TORN for _, how in [*case.before, *after])


def tolerance(case):
    """Return the share of the largest number that a case's coarsest dtype allows."""
    dtypes = {case.dtype, case.adapter_dtype or case.dtype}
    cast = any(how == "dtype" for _, how in case.before) or ("x", "") in case.before
    if case.autocast or cast or dtypes & {torch.bfloat16, torch.float16}:
        return 2e-2
    return 1e-5 if torch.float32 in dtypes or case.before else 1e-12


@hypothesis.seed(SEED)
@hypothesis.settings(settings, max_examples=CASES)
@hypothesis.given(lives)
def test_a_changed_layer_is_pefts_or_says_no(case):
    if any(how in TORN for _, how in case.between):
        case.before, case.autocast = [], False
    patched, model = models_of(case)
    ours = results_of(case, patched)
    error = ours.get("error")
    assert not isinstance(error, (SystemError, RecursionError)), error
    if is_torn(case):
        assert error is not None, ours
        return
    theirs = results_of(case, model)
    hypothesis.note(f"ours: {ours}\ntheirs: {theirs}")
    changed_since = case.mode == "backward" and case.between and "y" in ours
    if "error" in theirs or (error is not None and changed_since):
        assert error is not None, "PEFT raises, ours doesn't"
        return
    assert error is None, "ours raises, PEFT doesn't"
    # Memory put in a saved tensor's place: views that PEFT saved keep the old, ours reads the new.
    share = float("inf") if changed_since else tolerance(case)
    for what, result in theirs.items():
        assert_alike(ours[what], result, share, what)

"""Fuzzing: parameters of a live patched layer changed in every way, against PEFT's own layer.

An unpatched deep copy gets the same changes, before forward and between forward and backward. Both
raise, or both give the same; where a change makes torch itself read beyond memory, ours raises.
LORA_KERNELS_FUZZ=10000 sets the number of cases; LORA_KERNELS_TEST_SEED, printed, repeats them.
"""

import contextlib
import copy
import math
import random

import pytest
import torch
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
from tests.stacks.test_fuzz import CASES

SIZES = (1, 2, 8, 16, 17, 48, 64)


OTHERS = ("requires_grad", "none", "deleted", "shape", "shape")


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


def memory_of(where):
    """Return where the numbers lie that backward may read, by name."""
    found = {}
    for name, (owner, which) in where.items():
        parameter = owner._parameters.get(which)
        if "bias" not in name:
            with contextlib.suppress(RuntimeError):  # sparse ones and the like have none
                found[name] = id(parameter), parameter.data_ptr(), parameter.stride()
    return found


def results_of(case, model):
    """Return what a model gives after the case's changes: y and the gradients, or the exception.

    "moved" says whether a parameter looks at other memory since forward.
    """
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
            memory = memory_of(owners(layer))
            for what in case.between:
                with contextlib.suppress(Exception):
                    change(case, layer, x, what, rng)
            found["moved"] = memory_of(owners(layer)) != memory
            y.backward(numbers(y.shape, rng, y.dtype))
            found["x"] = x.grad
            for name, (owner, which) in owners(layer).items():
                found[name] = getattr(getattr(owner, which, None), "grad", None)
    except Exception as error:
        found["error"] = error
    return found


def assert_alike(ours, theirs, share, what, least):
    """Compare two results: kind, dtype, shape, device, and numbers by the dtype's tolerance.

    least: what numbers are relative to, at least.
    """
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
    largest = max(least, finite.max().item() if finite.numel() else 0.0)
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


@pytest.mark.filterwarnings("ignore")
def test_changed_layers_are_pefts_or_say_no():
    # Drawn evenly: hypothesis mutates what it has drawn, and half of its cases changed nothing.
    for index in range(CASES):
        case = random_case(random.Random(f"{SEED}/{index}"))
        try:
            check(case, models_of, results_of)
        except BaseException as error:
            error.add_note(f"case {index}: {case}")
            raise


def check(case, models_of, results_of, share=None, may_serve=(), refuses=()):
    """Compare what a patched model and its unpatched copy give after a case's changes.

    share: of the largest number that results may differ by, where it isn't `tolerance`.
    may_serve: parts of PEFT's errors for which ours may give something.
    refuses: parts of our errors that say no by name where PEFT may give something.
    """
    patched, model = models_of(case)
    ours = results_of(case, patched)
    error = ours.get("error")
    assert not isinstance(error, (SystemError, RecursionError)), error
    if is_torn(case):
        assert error is not None, ours
        return
    theirs = results_of(case, model)
    if "error" in theirs and case.dims == 1 and ("bias", "shape") in case.between:
        # AccumulateGrad looks at the shape of a gradient that somebody else holds: of one row the
        # bias's is dy itself where PEFT computes.
        return
    if any(text in str(error) for text in refuses):
        return
    changed_since = case.mode == "backward" and case.between and "y" in ours
    if error is None and any(text in str(theirs.get("error")) for text in may_serve):
        return
    if "error" in theirs or (error is not None and changed_since):
        assert error is not None, f"ours gives {ours}, PEFT raises {theirs['error']!r}"
        return
    assert error is None, f"ours raises {error!r}, PEFT gives {theirs}"
    # Memory put in a saved tensor's place: views that PEFT saved keep the old, ours reads the new.
    share = share or tolerance(case)
    share = float("inf") if ours.pop("moved", False) else share
    theirs.pop("moved", None)
    # What 16 bits round of a sum's terms stays where these cancel.
    least = math.sqrt(max(case.rows, case.n, case.k)) if share > 1e-2 else 1.0
    for what, result in theirs.items():
        assert_alike(ours[what], result, share, what, least)

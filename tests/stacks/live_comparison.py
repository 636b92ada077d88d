"""What the fuzzers of live layers compare: a patched model's results and its unpatched copy's."""

import contextlib
import math
import random

import torch

from tests.conftest import SEED
from tests.stacks.live_changes import TORN, numbers


def run_cases(name, count, random_case, check_case):
    """Check random cases, by the run's seed and a name of the fuzzer's."""
    # Drawn evenly: hypothesis mutates what it has drawn, and half of its cases changed nothing.
    for index in range(count):
        case = random_case(random.Random(f"{SEED}/{name}/{index}"))
        try:
            check_case(case)
        except BaseException as error:
            error.add_note(f"case {index}: {case}")
            raise


def outcome(case, call, given, owners_of, change, rng):
    """Return y of a call, and the gradients after what happens in between, or the exception.

    given: inputs by name. owners_of: () -> parameters' owners and names there. change: makes one
    change. "moved" says whether a parameter looks at other memory since forward.
    """
    grad = torch.no_grad() if case.mode == "no_grad" else contextlib.nullcontext()
    found = {}
    try:
        with grad, torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            found["y"] = y = call()
        if case.mode == "backward":
            memory = memory_of(owners_of())
            for what in case.between:
                with contextlib.suppress(Exception):  # a change that torch refuses isn't made
                    change(what)
            found["moved"] = memory_of(owners_of()) != memory
            y.backward(numbers(y.shape, rng, y.dtype))
            found |= {name: t.grad for name, t in given.items()}
            for name, (owner, which) in owners_of().items():
                found[name] = getattr(getattr(owner, which, None), "grad", None)
    except Exception as error:
        found["error"] = error
    return found


def memory_of(where):
    """Return where the numbers lie that backward may read, by name."""
    found = {}
    for name, (owner, which) in where.items():
        parameter = owner._parameters.get(which)
        if "bias" not in name:
            with contextlib.suppress(RuntimeError):  # sparse ones and the like have none
                found[name] = id(parameter), parameter.data_ptr(), parameter.stride()
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

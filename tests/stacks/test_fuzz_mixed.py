"""Fuzzing: parameters of a layer changed whose samples have adapters of their own, against PEFT's.

An unpatched deep copy gets the same changes, as in test_fuzz_live; PEFT's layer serves
`adapter_names` with gradients too, where its model refuses. A fifth of the number of cases that
LORA_KERNELS_FUZZ sets; LORA_KERNELS_TEST_SEED, printed, repeats them.
"""

import contextlib
import copy
import random
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.native import absence
from tests.stacks.live_changes import (
    DTYPES,
    FORMS,
    FORMS_OF_X,
    OTHERS,
    RANKS,
    TORN,
    change_parameter,
    change_scaling,
    numbers,
)
from tests.stacks.live_comparison import check, outcome, run_cases, tolerance
from tests.stacks.models import peft
from tests.stacks.test_fuzz import CASES

ADAPTERS = ("default", "two", "three")
BASE = ("weight", "bias")
FACTORS = tuple(f"lora_{factor} {name}" for factor in ("A", "B") for name in ADAPTERS)
# What adapter_batch says of a layer that it doesn't serve.
REFUSED = ("model: expected layers that serve", "expected one that serves adapter_batch")
WIDE = ("can't serve this call: needs a rank of at most 256",)  # of an implementation by name
DTYPES_OF_CPU = (torch.float32, torch.bfloat16)
IMPLS = ("auto", "eager", "reference", *(() if absence("cpu") else ("cpu", "cpu", "cpu")))


@dataclass
class Mixed:
    """A layer with three adapters, its call, and what happens before forward and backward."""

    names: list
    rows: int
    n: int
    k: int
    ranks: list
    dims: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    bias: bool
    lora_bias: bool
    impl: str
    batch: bool  # by adapter_batch, else by PEFT's adapter_names
    mode: str
    autocast: bool
    before: list
    between: list
    seed: int


def random_change(rng):
    """Return one change: of W or its bias, of a factor, of an adapter's rank or scaling."""
    kind = rng.choice(["base", "factor", "factor", "factor", "rank", "scaling"])
    if kind in ("base", "factor"):
        return rng.choice(BASE if kind == "base" else FACTORS), rng.choice([*FORMS, *OTHERS])
    return (kind, rng.choice(RANKS)) if kind == "rank" else (kind, "")


def random_case(rng):
    """Return a case; where something reads beyond memory, nothing else is changed."""
    names = [rng.choice((*ADAPTERS, "__base__")) for _ in range(rng.choice([1, 2, 5, 9]))]
    read = [f for f in FACTORS if f.split()[1] in names]
    torn = [(rng.choice(("weight", *read)), rng.choice(TORN))]
    between = rng.choice([[], [random_change(rng)], [random_change(rng)], torn])
    changes = [rng.choice([random_change(rng)] * 4 + [("x", "")]) for _ in range(rng.randrange(3))]
    # Without an adapter that is read the layer is its base layer, which torch computes.
    before = rng.choice([changes] * 6 + [torn if read else changes])
    between = between if read or between is not torn else []
    is_torn = torn in (before, between)
    impl = "cpu" if is_torn else rng.choice(IMPLS)
    return Mixed(
        names=names,
        rows=rng.choice([1, 3, 20]),
        n=rng.choice([1, 8, 17, 48]),
        k=rng.choice([1, 8, 17, 48]),
        ranks=[rng.choice([1, 2, 8, 17]) for _ in ADAPTERS],
        dims=rng.choice([2, 3, 4]),
        dtype=rng.choice(DTYPES_OF_CPU if impl == "cpu" else DTYPES),
        adapter_dtype=rng.choice([None, None, torch.float32]),
        bias=rng.random() < 0.5,
        lora_bias=not is_torn and rng.random() < 0.2,  # else torch would compute
        impl=impl,
        batch=rng.random() < 0.5,
        mode=rng.choice(["backward", "backward", "grad", "no_grad"]),
        autocast=not is_torn and rng.random() < 0.2,
        before=[] if between is torn else before,
        between=between,
        seed=rng.randrange(1 << 31),
    )


def owners(layer):
    """Return where the parameters of a layer lie, by target."""
    found = {name: (layer.base_layer, name) for name in BASE}
    for factor in FACTORS:
        kept, name = factor.split()
        found[factor] = getattr(layer, kept)[name], "weight"
    return found


def models_of(case):
    """Return a patched model and an unpatched copy of it."""
    rng = random.Random(case.seed)
    model = nn.Sequential(nn.Linear(case.k, case.n, bias=case.bias))
    for i, (name, rank) in enumerate(zip(ADAPTERS, case.ranks, strict=True)):
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["0"], lora_bias=case.lora_bias
        )
        model = model if i else peft.get_peft_model(model, config)
        if i:
            model.add_adapter(name, config)
    model.requires_grad_(False).to(case.adapter_dtype or case.dtype)
    for name, (owner, which) in owners(layer_of(model)).items():
        parameter = getattr(owner, which)
        if parameter is not None:
            dtype = case.dtype if name in BASE else case.adapter_dtype or case.dtype
            parameter.data = numbers(parameter.shape, rng, dtype)
            parameter.requires_grad_(name not in BASE)
    patched = copy.deepcopy(model)
    assert lk.patch_peft(patched, impl=case.impl).patched
    return patched, model


def layer_of(model):
    """Return the adapted layer."""
    return model.base_model.model[0]


def change(case, layer, x, what, rng):
    """Make one change to a layer, and return x, which may be what changes."""
    target, how = what
    if target == "x":
        form = FORMS_OF_X[rng.choice(list(FORMS_OF_X))]
        return form(x.detach(), rng).requires_grad_(x.requires_grad and rng.random() < 0.9)
    if target == "scaling":
        change_scaling(case, layer, rng)
    elif target == "rank":
        name, dtype = rng.choice(ADAPTERS), case.adapter_dtype or case.dtype
        layer.lora_A[name].weight.data = numbers((how, case.k), rng, dtype)
        layer.lora_B[name].weight.data = numbers((case.n, how), rng, dtype)
    else:
        change_parameter(*owners(layer)[target], how, rng)
    return x


def called(case, model, x):
    """Return a layer's output of samples that name their adapters."""
    if case.batch and "_lora_kernels_impl" in vars(layer_of(model)):
        with lk.adapter_batch(model, case.names):
            return layer_of(model)(x)
    return layer_of(model)(x, adapter_names=case.names)


def results_of(case, model):
    """Return what a layer gives after the case's changes: y and the gradients, or the exception."""
    rng, layer = random.Random(case.seed + 1), layer_of(model)
    shape = (len(case.names), *(case.rows, 2)[: case.dims - 2], case.k)
    x = numbers(shape, rng, case.dtype).requires_grad_(rng.random() < 0.7)
    for what in case.before:
        with contextlib.suppress(Exception):  # a change that torch refuses isn't made
            x = change(case, layer, x, what, rng)
    return outcome(
        case, lambda: called(case, model, x), {"x": x}, lambda: owners(layer),
        lambda what: change(case, layer, x, what, rng), rng,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_changed_layers_of_several_adapters_are_pefts_or_say_no():
    run_cases("mixed", CASES // 5, random_case, check_case)


def check_case(case):
    """Compare a case's two models."""
    refuses = (*(REFUSED if case.batch else ()), *(WIDE if case.impl == "cpu" else ()))
    check(case, models_of, results_of, tolerance(case), refuses=refuses)

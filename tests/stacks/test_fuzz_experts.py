"""Fuzzing: parameters of patched experts changed in every way, against PEFT's wrappers around them.

An unpatched deep copy gets the same changes, as in test_fuzz_live. A fifth of the number of cases
that LORA_KERNELS_FUZZ sets; LORA_KERNELS_TEST_SEED, printed, repeats them.
"""

import contextlib
import copy
import random
from dataclasses import dataclass

import pytest
import torch
from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lora_kernels as lk
from tests.stacks.live_changes import (
    DTYPES,
    FORMS,
    OTHERS,
    TORN,
    change_parameter,
    change_scaling,
    numbers,
)
from tests.stacks.live_comparison import check, outcome, run_cases, tolerance
from tests.stacks.models import peft
from tests.stacks.test_fuzz import CASES

PROJECTIONS = ("gate_up_proj", "down_proj")
KINDS = {"qwen": (Qwen3MoeConfig, Qwen3MoeExperts), "gpt-oss": (GptOssConfig, GptOssExperts)}
BASE = (*PROJECTIONS, "gate_up_proj_bias", "down_proj_bias")
FACTORS = tuple(f"{p} {f} {n}" for p in PROJECTIONS for f in ("A", "B") for n in ("default", "two"))
# What grouped_mm asks that ours doesn't; and several adapters' factors are joined in forward, so
# that a later change of one doesn't matter.
MAY_SERVE = ("Expected mat_a to be Float32", "multiple of 16 bytes", "Invalid strides/sizes")
MAY_SERVE_SEVERAL = "modified by an inplace operation"
INPUTS = ("x", "gates")
# Of infinities PEFT's product with W + s B A makes others than the products of ours.
FORMS_OF_NUMBERS = {name: form for name, form in FORMS.items() if name != "infinite"}
FORMS_OF_IDS = {
    "int32": lambda t: t.int(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand(t.shape),
    "fewer": lambda t: t[:-1],
    "one each": lambda t: t[:, :1],
    "one dimension": lambda t: t[:, 0],
    "floats": lambda t: t.float(),
}


@dataclass
class Experts:
    """A block of experts, its call, and what happens to it before forward and before backward."""

    kind: str
    rows: int
    n: int  # hidden
    k: int  # inner
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    adapted: tuple
    adapters: int
    implementation: str
    impl: str
    mode: str
    autocast: bool
    before: list
    between: list
    seed: int
    dims: int = 2


def random_change(rng):
    """Return one change: of a weight or bias, of a factor, of a scaling or an input."""
    kind = rng.choice(["base", "factor", "factor", "other"])
    if kind == "other":
        return rng.choice([("scaling", ""), ("ids", rng.choice(list(FORMS_OF_IDS)))])
    return rng.choice(BASE if kind == "base" else FACTORS), rng.choice([*FORMS_OF_NUMBERS, *OTHERS])


def random_case(rng):
    """Return a case; where something reads beyond memory, nothing else is changed."""
    adapted, adapters = (
        rng.choice([PROJECTIONS, PROJECTIONS, PROJECTIONS[:1], PROJECTIONS[1:]]),
        rng.choice([1, 1, 2]),
    )
    # Of several adapters forward joins the factors, and backward reads what it joined.
    read = [f for f in FACTORS if f.startswith(adapted) and f.endswith("default")]
    torn = [(rng.choice((*PROJECTIONS, *read)), rng.choice(TORN))]
    torn_since = [(rng.choice((*adapted, *read)), rng.choice(TORN))]
    torn_since = torn_since if adapters == 1 else [(rng.choice(adapted), rng.choice(TORN))]
    between = rng.choice([[], [random_change(rng)], [random_change(rng)], torn_since])
    inputs = [(name, rng.choice([*FORMS_OF_NUMBERS])) for name in INPUTS]
    changes = [rng.choice([random_change(rng)] * 4 + inputs) for _ in range(rng.randrange(3))]
    before = rng.choice([changes] * 6 + [torn])
    return Experts(
        kind=rng.choice(list(KINDS)),
        rows=rng.choice([1, 3, 11, 40]),
        n=rng.choice([16, 32, 48]),
        k=rng.choice([16, 32]),
        r=rng.choice([1, 2, 5, 16]),
        dtype=rng.choice(DTYPES),
        adapter_dtype=rng.choice([None, None, torch.float32]),
        adapted=adapted,
        adapters=adapters,
        implementation=rng.choice(["grouped_mm", "eager", "batched_mm"]),
        impl=rng.choice(["auto", "auto", "auto", "eager", "reference"]),
        mode=rng.choice(["backward", "backward", "grad", "no_grad"]),
        autocast=torn is not before and between is not torn_since and rng.random() < 0.15,
        before=[] if between is torn_since else before,
        between=between,
        seed=rng.randrange(1 << 31),
    )


class Block(nn.Module):
    """A module of experts alone, with a name that PEFT can target."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def owners(model):
    """Return where the parameters of a block lie, by target."""
    module, found = model.base_model.model.experts, {}
    while isinstance(module, ParamWrapper):
        for factor, kept in (("A", module.lora_A), ("B", module.lora_B)):
            for name, linear in kept.items():
                found[f"{module.parameter_name} {factor} {name}"] = linear, "weight"
        module = module.base_layer
    return found | {name: (module, name) for name in BASE if name in module._parameters}


def wrappers(model):
    """Return the wrappers around a block's experts."""
    return [m for m in model.modules() if isinstance(m, ParamWrapper)]


def models_of(case):
    """Return a patched model and an unpatched copy of it."""
    rng, (config, kind) = random.Random(case.seed), KINDS[case.kind]
    said = config(
        hidden_size=case.n, intermediate_size=case.k, moe_intermediate_size=case.k,
        num_experts=4, num_local_experts=4, num_experts_per_tok=2, swiglu_limit=1e6,
    )  # fmt: skip
    said._experts_implementation = case.implementation
    given = {
        "r": case.r, "lora_alpha": 2 * case.r, "target_modules": [],
        "target_parameters": [f"experts.{name}" for name in case.adapted],
    }  # fmt: skip
    model = peft.get_peft_model(Block(kind(said)), peft.LoraConfig(**given))
    if case.adapters > 1:
        model.add_adapter("two", peft.LoraConfig(**given))
        model.base_model.set_adapter(["default", "two"])
    for name, (owner, which) in owners(model).items():
        parameter = getattr(owner, which)
        dtype = case.dtype if name in BASE else case.adapter_dtype or case.dtype
        parameter.data = numbers(parameter.shape, rng, dtype)
        parameter.requires_grad_(name not in BASE)
    patched = copy.deepcopy(model)
    assert lk.patch_peft(patched, impl=case.impl).patched
    return patched, model


def change(case, model, given, what, rng):
    """Make one change to a block or the inputs of its call."""
    target, how = what
    if target in INPUTS:
        t = given[target]
        new = FORMS[how](t.detach(), rng)
        given[target] = new.requires_grad_(t.requires_grad and rng.random() < 0.9)
    elif target == "ids":
        given["ids"] = FORMS_OF_IDS[how](given["ids"])
    elif target == "scaling":
        change_scaling(case, rng.choice(wrappers(model)), rng)
    elif target in owners(model):
        change_parameter(*owners(model)[target], how, rng)


def results_of(case, model):
    """Return what a block gives after the case's changes: y and the gradients, or the exception."""
    rng = random.Random(case.seed + 1)
    gates = numbers((case.rows, 2), rng).softmax(-1).to(case.dtype)
    given = {
        "x": numbers((case.rows, case.n), rng, case.dtype).requires_grad_(rng.random() < 0.7),
        "ids": torch.tensor([rng.sample(range(4), 2) for _ in range(case.rows)]),
        "gates": gates.requires_grad_(rng.random() < 0.5),
    }
    for what in case.before:
        with contextlib.suppress(Exception):  # a change that torch refuses isn't made
            change(case, model, given, what, rng)
    return outcome(
        case, lambda: model(*given.values()), given, lambda: owners(model),
        lambda what: change(case, model, given, what, rng), rng,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_changed_experts_are_pefts_or_say_no():
    run_cases("experts", CASES // 5, random_case, check_case)


def check_case(case):
    """Compare a case's two models; PEFT rounds all of W + s B A to 16 bits, ours the products."""
    allowed = (*MAY_SERVE, MAY_SERVE_SEVERAL) if case.adapters > 1 else MAY_SERVE
    coarse = tolerance(case) > 1e-2
    check(case, models_of, results_of, 6e-2 if coarse else 1e-4, allowed)

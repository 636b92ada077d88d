"""Fuzzing: parameters of a live patched layer changed in every way, against PEFT's own layer.

An unpatched deep copy gets the same changes, before forward and between forward and backward. Both
raise, or both give the same; where a change makes torch itself read beyond memory, ours raises.
LORA_KERNELS_FUZZ=10000 sets the number of cases; LORA_KERNELS_TEST_SEED, printed, repeats them.
"""

import contextlib
import copy
import random
from dataclasses import dataclass
from functools import partial

import hypothesis
import numpy
import torch
from hypothesis import strategies as st
from peft.tuners.lora import Linear
from torch import nn

import lora_kernels as lk
from tests.conftest import SEED
from tests.stacks.models import peft
from tests.stacks.test_fuzz import CASES, settings

RANKS = (0, 1, 2, 5, 8, 16, 33, 64, 129, 300)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
TORN = ("emptied", "halved")
TARGETS = ("weight", "bias", "lora_A", "lora_B", "lora_bias")


@dataclass
class Live:
    """A layer, its call, and what happens to it before forward and before backward."""

    rows: int
    n: int
    k: int
    r: int
    dims: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    bias: bool
    lora_bias: bool
    impl: str
    prepacked: bool
    mode: str  # "backward", "grad" or "no_grad"
    autocast: bool
    before: list
    between: list
    seed: int


class Watched(torch.Tensor):
    """A subclass whose operators are torch's."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Wrapped(torch.Tensor):
    """A wrapper that holds its numbers in another tensor and computes with that."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = partial(torch.utils._pytree.tree_map_only, cls, lambda t: t.inner)
        return function(*plain(args), **plain(kwargs or {}))


def numbers(shape, rng, dtype=torch.float32):
    """Return random numbers that a layer and its copy both get."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 31))
    values = torch.randn(list(shape), generator=generator) * 0.5
    return (values * 8).to(dtype) if dtype in (torch.int8, torch.int32) else values.to(dtype)


def inside(t, *room):
    """Return t as a slice of a larger tensor that is NaN elsewhere."""
    larger = torch.full([size + 2 * more for size, more in zip(t.shape, room, strict=True)], 3)
    larger = larger.to(t.dtype).fill_(float("nan") if t.is_floating_point() else 3)
    for d, (size, more) in enumerate(zip(t.shape, room, strict=True)):
        larger = larger.narrow(d, more, size)
    return larger.copy_(t)


def another_shape(shape, rng):
    """Return a shape that differs by one size, by one dimension, or by their order."""
    sizes, d = list(shape), rng.randrange(max(1, len(shape)))
    choice = rng.randrange(7)
    if choice == 0 or not sizes:
        return [*sizes, 1]
    if choice == 1:
        return [1, *sizes]
    if choice == 2:
        return sizes[::-1]
    if choice == 3:
        return sizes[:d] + sizes[d + 1 :]
    sizes[d] = (0, max(0, sizes[d] - 1), sizes[d] + 1, 1, 2 * sizes[d])[rng.randrange(5)]
    return sizes


# What a tensor is replaced by: of its numbers in another form, or of new ones.
FORMS = {
    "shape": lambda t, rng: numbers(another_shape(t.shape, rng), rng, t.dtype),
    "values": lambda t, rng: numbers(t.shape, rng, t.dtype),
    "dtype": lambda t, rng: numbers(
        t.shape, rng, rng.choice([*DTYPES, torch.int8, torch.int32, torch.complex64])
    ),
    "transposed": lambda t, rng: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t, rng: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
    "slice": lambda t, rng: inside(t, *(rng.randrange(4) for _ in t.shape)),
    "expanded": lambda t, rng: t.select(rng.randrange(t.ndim), 0).expand(t.shape),
    "stride 0": lambda t, rng: numbers([], rng, t.dtype).expand(t.shape),
    "overlapping": lambda t, rng: numbers([sum(t.shape)], rng, t.dtype).as_strided(
        t.shape, [1] * t.ndim
    ),
    # The same memory read otherwise.
    "own, transposed": lambda t, rng: t.t() if t.ndim <= 2 else t,
    "own, reshaped": lambda t, rng: t.reshape(t.shape[::-1]),
    "own, strided": lambda t, rng: t.as_strided(t.shape, t.stride()[::-1]),
    "own, narrowed": lambda t, rng: t.narrow(-1, 0, t.shape[-1] // 2),
    "own, expanded": lambda t, rng: t[:1].expand(t.shape),
    "meta": lambda t, rng: t.to("meta"),
    "coo": lambda t, rng: t.to_sparse(),
    "csr": lambda t, rng: t.to_sparse_csr(),
    "mkldnn": lambda t, rng: t.to_mkldnn(),
    "nested": lambda t, rng: torch.nested.nested_tensor(list(t)),
    "subclass": lambda t, rng: t.clone().as_subclass(Watched),
    "wrapper": lambda t, rng: Wrapped(t.clone()),
    "inference": lambda t, rng: inference(t),
    "empty": lambda t, rng: t.new_zeros(0),
    "infinite": lambda t, rng: numbers(t.shape, rng, t.dtype).index_fill_(
        0, torch.tensor([0]), rng.choice([float("inf"), float("nan")])
    ),
}


# Torch's own linear ends the process on a jagged weight or bias.
FORMS_OF_X = {
    **FORMS,
    "jagged": lambda t, rng: torch.nested.nested_tensor([t, t], layout=torch.jagged),
}


def inference(t):
    """Return a copy of t made in inference mode."""
    with torch.inference_mode():
        return t.clone()


def by_data(owner, name, old, new):
    """Give the parameter itself other numbers."""
    old.data = new


def by_parameter(owner, name, old, new):
    """Put another parameter in its place."""
    setattr(owner, name, nn.Parameter(new, requires_grad=old.requires_grad))


def by_dict(owner, name, old, new):
    """Put a plain tensor there, as functional_call does."""
    owner._parameters[name] = new


def by_set(owner, name, old, new):
    """Let the parameter look at other memory."""
    with torch.no_grad():
        old.set_(new)


def by_resize(owner, name, old, new):
    """Resize the parameter's own memory, then write."""
    with torch.no_grad():
        old.resize_(new.shape).copy_(new)


def by_copy(owner, name, old, new):
    """Write other numbers in place."""
    with torch.no_grad():
        old.copy_(new)


WAYS = (by_data, by_data, by_parameter, by_dict, by_set, by_resize, by_copy)
SCALINGS = (
    *(2, 0, 0.0, -1.5, 1e30, True, float("inf"), float("nan"), None, "2", 1j),
    *(numpy.float32(1.5), numpy.float64(1.5), numpy.int64(2), numpy.array(1.5), numpy.array([2.0])),
    *(torch.tensor(1.5), torch.tensor(1.5, dtype=torch.float64), torch.tensor(2)),
    *(torch.tensor(True), torch.tensor([1.5]), torch.tensor([[1.5]]), torch.tensor(float("nan"))),
    *(torch.tensor(float("inf")), torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor(1j)),
    *(torch.tensor(1.5, requires_grad=True), torch.tensor(1.5, device="meta"), torch.empty(0)),
    *(torch.tensor([1.5, 2.0]), "[B, 1]", "[N]", "[N] ints"),
)
DROPOUTS = (0, 0.0, 1.0, 1, -0.1, 1.5, float("nan"), None, "0", torch.tensor(0.0), False)


def scaling_of(case, choice):
    """Return a scaling; those of several elements have the layer's sizes."""
    if (
        type(choice) is float
        and choice == 1e30
        and torch.float16 in (case.dtype, case.adapter_dtype)
    ):
        return 64.0  # beyond float16 ours is finite where PEFT's isn't
    shapes = {"[B, 1]": (case.rows, 1), "[N]": (case.n,), "[N] ints": (case.n,)}
    if not isinstance(choice, str) or choice not in shapes:
        return copy.deepcopy(choice)
    dtype = torch.int64 if "ints" in choice else torch.float32
    return torch.arange(1, 1 + shapes[choice][0]).to(dtype).reshape(shapes[choice])


def owners(layer):
    """Return where the parameters of a layer lie, by target."""
    lora_B = layer.lora_B["default"]
    return {
        "weight": (layer.base_layer, "weight"),
        "bias": (layer.base_layer, "bias"),
        "lora_A": (layer.lora_A["default"], "weight"),
        "lora_B": (lora_B, "weight"),
        "lora_bias": (lora_B, "bias"),
    }


def change(case, layer, x, what, rng):
    """Make one change to a layer, and return x, which may be what changes."""
    target, how = what
    where = owners(layer)
    if target == "x":
        form = FORMS_OF_X[rng.choice(list(FORMS_OF_X))]
        return form(x.detach(), rng).requires_grad_(x.requires_grad and rng.random() < 0.9)
    if target == "scaling":
        layer.scaling["default"] = scaling_of(case, rng.choice(SCALINGS))
        if how == "emptied":
            layer.scaling["default"] = torch.tensor(1.5)
            layer.scaling["default"].untyped_storage().resize_(0)
    elif target == "dropout":
        layer.lora_dropout["default"].p = rng.choice(DROPOUTS)
    elif target == "rank":
        for name, shape in (("lora_A", (how, case.k)), ("lora_B", (case.n, how))):
            getattr(layer, name)["default"].weight.data = numbers(
                shape, rng, case.adapter_dtype or case.dtype
            )
    elif target == "swap":
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        a.weight, b.weight = b.weight, a.weight
    else:
        change_parameter(*where[target], how, rng)
    return x


def change_parameter(owner, name, how, rng):
    """Make one change to a parameter, which may be absent."""
    old = owner._parameters.get(name)
    if old is None:
        shape = owner.weight.shape[:1]
        old = nn.Parameter(numbers(shape, rng, owner.weight.dtype))
        setattr(owner, name, old)
    if how == "none":
        setattr(owner, name, None)
    elif how == "deleted":
        delattr(owner, name)
    elif how == "requires_grad":
        old.requires_grad_(not old.requires_grad)
    elif how == "emptied":
        old.untyped_storage().resize_(0)
    elif how == "halved":
        old.untyped_storage().resize_(old.untyped_storage().nbytes() // 2)
    else:
        way = rng.choice(WAYS)
        # Nothing would be written into memory that was just resized.
        way = by_data if how == "meta" else way
        way(owner, name, old, FORMS[how](old.detach(), rng))


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

"""How the fuzzer of live layers changes parameters, inputs and settings: in every way it knows."""

import copy
from dataclasses import dataclass
from functools import partial

import numpy
import torch
from torch import nn

RANKS = (0, 1, 2, 5, 8, 16, 33, 64, 129, 300)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
TORN = ("emptied", "halved")
OTHERS = ("requires_grad", "none", "deleted", "shape", "shape")
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


def change_scaling(case, layer, rng):
    """Give one of a layer's adapters another scaling."""
    layer.scaling[rng.choice(sorted(layer.scaling))] = scaling_of(case, rng.choice(SCALINGS))


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
        change_scaling(case, layer, rng)
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
        # As data a wrapper has no memory, which torch itself reads: test_checks has that.
        way = by_parameter if how == "wrapper" else way
        way(owner, name, old, FORMS[how](old.detach(), rng))

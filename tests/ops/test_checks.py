"""Bad input: the right error, naming the argument, what was expected and what came."""

import re

import pytest
import torch

import lora_kernels as lk
from lora_kernels.dispatch import CHOICES
from lora_kernels.native import absence
from lora_kernels.operands.call import Adapter, scaling_for
from lora_kernels.registration import operators

X, W = torch.randn(4, 8), torch.randn(6, 8)
A, B = torch.randn(2, 8), torch.randn(6, 2)
GOOD = {"x": X, "weight": W, "lora_A": A, "lora_B": B, "bias": None}

BAD_TENSORS = {
    "x is a list": ({"x": [1.0]}, TypeError, r"x: expected a torch.Tensor, got list"),
    "x is integer": ({"x": X.long()}, TypeError, r"x: expected float16.*got torch.int64"),
    "x is 0-dim": ({"x": torch.tensor(1.0)}, ValueError, r"x: expected at least one dimension"),
    "x is complex": ({"x": X.to(torch.complex64)}, TypeError, r"x: expected float16.*complex64"),
    "features differ": ({"x": torch.randn(4, 7)}, ValueError, r"weight: expected shape \[N, 7\]"),
    "weight transposed": ({"weight": W.t()}, ValueError, r"weight:.*looks transposed"),
    "weight is 3-D": ({"weight": W[None]}, ValueError, r"weight: expected two dimensions"),
    "weight of another dtype": (
        {"weight": W.half()},
        TypeError,
        r"weight: expected the dtype of x",
    ),
    "weight elsewhere": ({"weight": W.to("meta")}, ValueError, r"weight: expected the device of x"),
    "A and B swapped": ({"lora_A": B, "lora_B": A}, ValueError, r"lora_A:.*look swapped"),
    "A transposed": ({"lora_A": A.t()}, ValueError, r"lora_A: expected shape \[R, 8\]"),
    "A is 1-D": ({"lora_A": A[0]}, ValueError, r"lora_A: expected two dimensions"),
    "A is integer": ({"lora_A": A.int()}, TypeError, r"lora_A: expected float16"),
    "rank 0": (
        {"lora_A": torch.empty(0, 8), "lora_B": torch.empty(6, 0)},
        ValueError,
        r"lora_A: expected a rank of at least 1",
    ),
    "ranks differ": ({"lora_B": torch.randn(6, 3)}, ValueError, r"lora_B: expected shape \[6, 2\]"),
    "B of another N": ({"lora_B": torch.randn(5, 2)}, ValueError, r"lora_B: expected shape \[6, R"),
    "bias too long": ({"bias": torch.randn(7)}, ValueError, r"bias: expected shape \[6\]"),
    "bias of another dtype": ({"bias": torch.randn(6).half()}, TypeError, r"bias: expected the dt"),
    "all on meta": (
        {"x": X.to("meta"), "weight": W.to("meta"), "lora_A": A.to("meta"), "lora_B": B.to("meta")},
        ValueError,
        r"meta tensor holds no data",
    ),
}
BAD_OPTIONS = {
    "scaling NaN": ({"scaling": float("nan")}, ValueError, r"scaling: expected a finite number"),
    "scaling infinite": ({"scaling": float("inf")}, ValueError, r"scaling: expected a finite"),
    "scaling a string": ({"scaling": "2"}, TypeError, r"scaling: expected a number, got str"),
    "scaling a vector": ({"scaling": torch.ones(2)}, ValueError, r"scaling: expected a 0-dim"),
    "scaling trains": (
        {"scaling": torch.tensor(1.0, requires_grad=True)},
        ValueError,
        r"scaling: expected a 0-dim float tensor that doesn't require grad",
    ),
    "p is 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability in \[0, 1\)"),
    "p negative": ({"dropout_p": -0.1}, ValueError, r"dropout_p: expected a probability"),
    "p NaN": ({"dropout_p": float("nan")}, ValueError, r"dropout_p: expected a probability"),
    "p a string": ({"dropout_p": "0.1"}, TypeError, r"dropout_p: expected a number, got str"),
    "seed a float": ({"seed": 1.5}, TypeError, r"seed: expected None, an int or a tensor"),
    "seed too large": ({"seed": 1 << 63}, ValueError, r"seed: expected a signed 64-bit integer"),
    "seed a vector": ({"seed": torch.zeros(2).long()}, ValueError, r"seed: expected a 0-dim int64"),
    "impl unknown": ({"impl": "magic"}, ValueError, r"impl: expected one of 'auto'.*'magic'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
@pytest.mark.parametrize("function", [lk.lora_linear, lk.explain])
def test_bad_tensors(function, change, error, message):
    if function is lk.explain and "meta tensor" in message:
        explanation = lk.explain(**(GOOD | change))
        assert explanation.choice is None
        assert "meta tensor" in str(explanation)
        return
    with pytest.raises(error, match=message):
        function(**(GOOD | change))


@pytest.mark.parametrize(("change", "error", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
@pytest.mark.parametrize("function", [lk.lora_linear, lk.explain])
def test_bad_options(function, change, error, message):
    with pytest.raises(error, match=message):
        function(**GOOD, **change)


@pytest.mark.parametrize("scaling", [2.0, 2])
@pytest.mark.parametrize("function", [lk.lora_linear, lk.explain])
def test_scaling_by_position_is_said_to_be_a_keyword(function, scaling):
    with pytest.raises(TypeError, match=r"bias: expected .*, got .* \(scaling is a keyword\)$"):
        function(X, W, A, B, scaling)
    with pytest.raises(TypeError, match=r"bias: expected a torch.Tensor, got str$"):
        function(X, W, A, B, "none")


@pytest.mark.parametrize("given", [(16,), (16, 32)])
def test_settings_by_position_are_said_to_be_keywords(given):
    message = r"^r: expected as a keyword, r=\.\.\., got 16 by position$"
    with pytest.raises(TypeError, match=message):
        lk.LoRALinear(64, 128, *given)
    linear = torch.nn.Linear(8, 8)
    with pytest.raises(TypeError, match=message):
        lk.LoRALinear.from_linear(linear, *given)
    assert linear.weight.requires_grad


def test_the_docstring_says_what_is_easily_missed():
    first = lk.lora_linear.__doc__.splitlines()[0]
    assert "`dropout_p` does nothing without `training=True`" in first
    listed = re.search(r"impl: (.*?)\. ", lk.lora_linear.__doc__, re.DOTALL)[1]
    assert set(re.findall(r'"(\w+)"', listed)) == set(CHOICES)


def test_scaling_beside_another_device():
    """A tensor on the CPU is read, without a wait for a GPU; elsewhere it is x's or refused."""
    cpu, gpu = torch.device("cpu"), torch.device("meta")
    here = torch.tensor(1.5, dtype=torch.bfloat16)
    assert scaling_for(here, cpu) is here
    assert scaling_for(here, gpu) == 1.5
    assert type(scaling_for(here, gpu)) is float
    assert scaling_for(2.5, gpu) == 2.5
    there = here.to("meta")
    assert scaling_for(there, gpu) is there
    assert scaling_for(torch.ones(3), gpu).device == gpu, "one for each group"
    # Modules come to operators without a look at scaling.
    assert Adapter(A.to(gpu), B.to(gpu), here).flat_scaling() == (None, 1.5)
    with pytest.raises(ValueError, match=r"scaling: expected a tensor on cpu, .* got one on meta"):
        scaling_for(there, cpu)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's, of a difference of infinities
def test_an_infinite_number_of_numpys_is_refused_without_a_warning():
    numpy = pytest.importorskip("numpy")
    with pytest.raises(ValueError, match="scaling: expected a finite number, got inf"):
        lk.lora_dora_linear(X, W, A, B, W[:, 0], scaling=numpy.float64("inf"))


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_a_named_implementation_raises_its_reason(impl):
    meta = {name: t.to("meta") for name, t in GOOD.items() if t is not None}
    with pytest.raises(ValueError, match=f"impl: '{impl}' can't serve this call: a meta tensor"):
        lk.lora_linear(**meta, impl=impl)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (((), 0.1, 1), ValueError, "shape: expected"),
        (((2, -1), 0.1, 1), ValueError, "shape: expected"),
        ((3, 0.1, 1), ValueError, "shape: expected"),
        (((2, 2.5), 0.1, 1), ValueError, "shape: expected"),
        (((2, 2), 1.0, 1), ValueError, "dropout_p: expected"),
        (((2, 2), 0.1, None), TypeError, "seed: expected"),
        (((2, 2), 0.1, "1"), TypeError, "seed: expected"),
    ],
)
def test_bad_mask_arguments(args, error, message):
    with pytest.raises(error, match=message):
        lk.dropout_mask(*args)


def test_explain_names_the_choice_and_a_reason_for_each_other():
    explanation = lk.explain(**GOOD, dropout_p=0.1, training=True)
    compiled = absence("cpu") is None
    assert explanation.choice == ("cpu" if compiled else "eager")
    others = {"triton", "cuda", "cpu", "eager", "reference"} - {explanation.choice}
    assert explanation.reasons.keys() == others
    assert str(explanation).startswith(f"auto -> {explanation.choice}\n  triton: ")
    positional = [GOOD[name] for name in ("x", "weight", "lora_A", "lora_B")]
    for given in ((lk.lora_linear, *positional), positional):
        assert lk.explain(*given, dropout_p=0.1, training=True) == explanation
    with pytest.raises(TypeError, match=r"function: expected one of lora_linear, .* got"):
        lk.explain(torch.nn.functional.linear, *positional)
    with pytest.raises(TypeError, match="'lora_B'"):
        lk.explain(lk.lora_linear, *positional[:3])


class Wrapped(torch.Tensor):
    """A wrapper whose own data is a size without memory."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


def _without_memory(t, how):
    """Return a parameter of t's shape whose memory is gone, as ZeRO-3, FSDP and wrappers do it."""
    parameter = torch.nn.Parameter(t.clone())
    if how == "wrapper":
        parameter.data = Wrapped(t.shape)
    else:
        storage = parameter.untyped_storage()
        storage.resize_({"emptied": 0, "halved": storage.nbytes() // 2}[how])
    return parameter


@pytest.mark.parametrize("how", ["emptied", "halved", "wrapper"])
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "bias"])
@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("impl", ["cpu", "eager", "reference"])
def test_tensors_without_memory_are_named(impl, cast, name, how):
    if impl == "cpu" and absence("cpu"):
        pytest.skip(absence("cpu"))
    tensors = GOOD | {"bias": torch.randn(6)}
    tensors[name] = _without_memory(tensors[name], how)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=cast),
        pytest.raises((ValueError, RuntimeError), match=f"{name}: expected memory for shape"),
    ):
        lk.lora_linear(**tensors, impl=impl)


@pytest.mark.parametrize("how", ["emptied", "halved", "wrapper"])
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("impl", ["cpu", "eager", "reference"])
def test_memory_that_goes_between_the_passes_is_missed(impl, name, how):
    if impl == "cpu" and absence("cpu"):
        pytest.skip(absence("cpu"))
    tensors = {k: v if v is None else torch.nn.Parameter(v.clone()) for k, v in GOOD.items()}
    y = lk.lora_linear(**tensors, impl=impl)
    if how == "wrapper":
        tensors[name].data = Wrapped(tensors[name].shape)
    else:
        storage = tensors[name].untyped_storage()
        storage.resize_({"emptied": 0, "halved": storage.nbytes() // 2}[how])
    with pytest.raises((ValueError, RuntimeError), match=f"{name}: expected memory for shape"):
        y.sum().backward()


UNKNOWN = {
    "format": ((None, "nf4"), "format: expected .*got '?nf4'?"),
    "parts of a dense weight": (([W], None), "parts: expected none of a dense weight, got some"),
    "parts, dense by name": (([W], "dense"), "parts: expected none of a dense weight, got some"),
}


def refuses_unknown_formats(impl, what):
    """Check that an operator names what it doesn't know of W, in both directions."""
    (parts, form), message = UNKNOWN[what]
    operators_of = operators("lora_linear", impl)
    y, xa = operators_of.forward(X, W, None, None, A, B, None, None, 0, None, 1.0)
    with pytest.raises((ValueError, RuntimeError), match=message):
        operators_of.forward(X, W, parts, form, A, B, None, None, 0, None, 1.0)
    with pytest.raises((ValueError, RuntimeError), match=message):
        operators_of.backward(y, X, xa, W, parts, form, A, B, None, 0, None, 1.0, [True] * 4)


@pytest.mark.parametrize("what", UNKNOWN)
@pytest.mark.parametrize("impl", ["cpu", "eager", "reference"])
def test_an_operator_names_a_format_that_it_does_not_know(impl, what):
    if impl == "cpu" and absence("cpu"):
        pytest.skip(absence("cpu"))
    refuses_unknown_formats(impl, what)

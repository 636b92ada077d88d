"""`explain` of each function: the implementation that a call takes, errors as the function's."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.dispatch import IMPLEMENTATIONS


def linear(m=3, n=6, k=4):
    return torch.randn(m, k), torch.randn(n, k), torch.randn(2, k), torch.randn(n, 2)


def dora():
    return *linear(), torch.randn(6)


def embedding():
    return torch.tensor([[1, 2]]), torch.randn(5, 4), torch.randn(2, 5), torch.randn(4, 2)


def conv(dims, kernel=3):
    ones = [1] * dims
    kernels = [kernel] * dims
    return (
        torch.randn(1, 4, *[5] * dims),
        *(torch.randn(6, 4, *kernels), torch.randn(2, 4, *kernels), torch.randn(6, 2, *ones)),
    )


CALLS = {
    lk.lora_linear: linear,
    lk.lora_dora_linear: dora,
    lk.lora_embedding: embedding,
    lk.lora_conv1d: lambda: conv(1),
    lk.lora_conv2d: lambda: conv(2),
    lk.lora_conv3d: lambda: conv(3),
}
each = pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)


@each
def test_the_choice_is_what_serves_the_call(function):
    arguments = CALLS[function]()
    found = lk.explain(function, *arguments)
    assert found.choice not in found.reasons
    assert {found.choice, *found.reasons} == {i.name for i in IMPLEMENTATIONS}
    expected = function(*arguments)
    assert torch.equal(function(*arguments, impl=found.choice), expected)
    for name, reason in found.reasons.items():
        if "comes first" not in reason:
            with pytest.raises(ValueError, match="can't serve this call"):
                function(*arguments, impl=name)


def test_a_convolution_that_is_a_linear_layer_is_explained_as_one():
    x, *others = conv(2, kernel=1)
    last = x.contiguous(memory_format=torch.channels_last)
    linear_choice = lk.explain(lk.lora_linear, *linear()).choice
    assert lk.explain(lk.lora_conv2d, last, *others).choice == linear_choice
    assert lk.explain(lk.lora_conv2d, x, *others).choice == "eager"


BAD = {
    "magnitude": (lk.lora_dora_linear, 4, lambda t: t[:3]),
    "ids": (lk.lora_embedding, 0, lambda t: t.float()),
    "lora_embedding_A": (lk.lora_embedding, 2, lambda t: t[:, :4]),
    "lora_A": (lk.lora_conv2d, 2, lambda t: t[..., :2]),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_the_functions(name):
    function, place, spoil = BAD[name]
    arguments = list(CALLS[function]())
    arguments[place] = spoil(arguments[place])
    with pytest.raises((TypeError, ValueError)) as error:
        function(*arguments)
    with pytest.raises(type(error.value)) as explained:
        lk.explain(function, *arguments)
    assert str(explained.value) == str(error.value)
    assert name in str(error.value)


def test_keywords_are_checked():
    for function, wrong in (
        (lk.lora_embedding, {"padding_idx": 7}),
        (lk.lora_embedding, {"embed_scale": float("nan")}),
        (lk.lora_conv2d, {"stride": 0}),
        (lk.lora_conv2d, {"dropout_p": 1.0}),
        (lk.lora_dora_linear, {"impl": "none"}),
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
            lk.explain(function, *CALLS[function](), **wrong)

"""A single tensor without memory, of any argument of any operator, is an error that names it.

Of one on meta torch asks the operator's fake, whose results nothing has written. What somebody
emptied torch's own operators read: that ended the process.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from tests.support.implementations import IMPLS


def drawn(*shape):
    return torch.randn(shape, requires_grad=True)


def matrix_call():
    return (drawn(5, 16), torch.randn(24, 16), drawn(4, 16), drawn(24, 4))


def _options():
    """What a call may have beside its matrices, tensors all."""
    seed = {"dropout_p": 0.5, "training": True, "seed": torch.tensor(3)}
    return {"scaling": torch.tensor(2.0), **seed}


def _embedding(impl):
    tensors = torch.randn(20, 6), drawn(4, 20), drawn(6, 4)
    scales = {"scaling": torch.tensor(2.0), "embed_scale": torch.tensor(2.0)}
    return lk.lora_embedding(torch.tensor([[3, 1], [3, 0]]), *tensors, **scales, impl=impl)


def _conv(impl):
    tensors = drawn(2, 4, 6, 6), torch.randn(6, 4, 3, 3), drawn(2, 4, 3, 3), drawn(6, 2, 1, 1)
    return lk.lora_conv2d(*tensors, drawn(6), **_options(), impl=impl)


def _grouped(impl):
    order, numbers = torch.arange(5), torch.arange(3, dtype=torch.int32)
    groups = {"rows": order, "scatter": order, "weights": numbers, "adapters": numbers}
    tensors = drawn(5, 16), torch.randn(3, 24, 16), drawn(3, 4, 16), drawn(3, 24, 4)
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    options = groups | _options()
    return lk.grouped_lora_linear(*tensors, offsets, drawn(3, 24), **options, impl=impl)


CALLS = {
    "lora_linear": lambda impl: lk.lora_linear(*matrix_call(), drawn(24), **_options(), impl=impl),
    "lora_dora_linear": lambda impl: lk.lora_dora_linear(
        *matrix_call(), drawn(24), drawn(24), **_options(), impl=impl
    ),
    "lora_embedding": _embedding,
    "lora_conv": _conv,
    "grouped_lora_linear": _grouped,
}


class Operators(TorchDispatchMode):
    """Keeps the operators of ours that were called, with what they were given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if str(operator).startswith("lora_kernels."):
            self.calls.append((operator, args))
        return operator(*args, **(kwargs or {}))


def emptied(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize("lost", [lambda t: t.to("meta"), emptied], ids=["meta", "emptied"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", CALLS)
def test_one_tensor_without_memory_is_an_error(op, impl, lost):
    if (op, impl) == ("lora_conv", "cpu"):
        pytest.skip("cpu has no lora_conv")
    with Operators() as seen:
        CALLS[op](impl).sum().backward()
    ways = [call for call in seen.calls if call[0].__name__.startswith((f"{op}_for", f"{op}_back"))]
    assert len(ways) == 2, "forward and backward"
    for operator, args in ways:
        for i, argument in enumerate(operator._schema.arguments):
            if not isinstance(args[i], torch.Tensor):
                continue
            given = [*args[:i], lost(args[i].detach()), *args[i + 1 :]]
            with torch.no_grad(), pytest.raises((ValueError, RuntimeError)) as caught:
                operator(*given)
            name, text = argument.name.removesuffix("_tensor"), str(caught.value)
            # Of the first on meta the second is named; some are refused by torch itself.
            named = f"{name}: expected" in text or (i == 0 and "expected" in text)
            assert named or (lost is not emptied and "meta" in text), (name, text)

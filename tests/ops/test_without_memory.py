"""A single tensor without memory, of any argument of any operator, is an error that names it.

Of one on meta torch asks the operator's fake, whose results nothing has written. What somebody
emptied torch's own operators read: that ended the process.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from lora_kernels.operands.dropout import Dropout
from lora_kernels.operands.mixed import MixedCall
from lora_kernels.ops.mixed import run as run_mixed
from lora_kernels.registration import NAMES
from tests.support.implementations import IMPLS
from tests.support.quantised import drawn as quantised


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


def _mixed(impl):
    """Of two samples, of an adapter each."""
    numbers = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1, 0]).int()
    a, b = ([drawn(r, 16) for r in (2, 3)], [drawn(24, r) for r in (2, 3)])
    dropout = Dropout(torch.tensor(3), 1 << 15)
    call = MixedCall(torch.randn(24, 16), a, b, *numbers, drawn(24), dropout)
    return run_mixed(drawn(4, 16), call, impl)


def _quantised(impl):
    a, b = drawn(4, 128), drawn(64, 4)
    return lk.lora_linear(drawn(5, 128), quantised("nf4-nested", 64, 128), a, b, impl=impl)


CALLS = {
    "lora_linear": lambda impl: lk.lora_linear(*matrix_call(), drawn(24), **_options(), impl=impl),
    "lora_dora_linear": lambda impl: lk.lora_dora_linear(
        *matrix_call(), drawn(24), drawn(24), **_options(), impl=impl
    ),
    "lora_embedding": _embedding,
    "lora_conv": _conv,
    "grouped_lora_linear": _grouped,
    "mixed_lora_linear": _mixed,
    "quantised lora_linear": _quantised,
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
    name = op.split()[-1]
    ways = [c for c in seen.calls if c[0].__name__.startswith((f"{name}_for", f"{name}_back"))]
    assert len(ways) == 2, "forward and backward"
    for operator, args in ways:
        for i, given in _each_lost(args, lost):
            with torch.no_grad(), pytest.raises((ValueError, RuntimeError)) as caught:
                operator(*given)
            _check_named(operator._schema.arguments[i].name, i == 0, lost, str(caught.value))


def _each_lost(args, lost):
    """Yield the arguments with each tensor lost in turn, and where it is among them."""
    for i, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            yield i, [*args[:i], lost(arg.detach()), *args[i + 1 :]]
        elif isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor):
            for j, t in enumerate(arg):
                less = [*arg[:j], lost(t.detach()), *arg[j + 1 :]]
                yield i, [*args[:i], less, *args[i + 1 :]]


def _check_named(name, first, lost, text):
    """Of the first on meta the second is named; some on meta are refused by torch itself.

    Compiled parts call the parts of a format by their names.
    """
    named = f"{NAMES.get(name, name)}: expected" in text
    named |= (first or name == "parts") and ": expected" in text
    assert named or (lost is not emptied and "meta" in text), (name, text)

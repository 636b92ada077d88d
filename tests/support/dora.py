"""DoRA's inputs, its results by name, and the error budget of `lora_kernels.testing` for them."""

import torch

import lora_kernels as lk
from lora_kernels.impl.reference import dora as reference
from lora_kernels.operands.call import Adapter, LinearCall
from lora_kernels.operands.dora import DoraCall, DoraWanted, Kept
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.weight import Dense
from lora_kernels.testing import FEW_SUMS, MANY_DRAWS, MORE_DRAWS, assert_within_budget, make_inputs

GRADIENTS = ("dx", "da", "db", "dbias", "dm")


def make_dora_inputs(case):
    """Return a case's inputs and a magnitude of gains between .5 and 1.5, one 0 and one negative.

    It has the adapters' dtype.
    """
    inputs = make_inputs(case)
    norm = reference.row_norms(call_of(case, inputs, torch.ones(())).linear)
    magnitude = norm * (0.5 + torch.rand(case.n))
    if case.n > 2:
        magnitude[0], magnitude[1] = 0.0, -magnitude[1]
    return inputs, magnitude.to(inputs.lora_A.dtype)


def call_of(case, inputs, magnitude, dtype=None):
    """Return the call of a case's inputs, its tensors in `dtype` if there is one."""
    named = (inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias, magnitude)
    w, a, b, bias, m = (t if t is None or dtype is None else t.to(dtype) for t in named)
    dropout = drawn(case.dropout_p, inputs.seed, w.device)
    return DoraCall(LinearCall(Dense(w), Adapter(a, b, case.scaling), bias, dropout), m)


def results(case, inputs, magnitude, impl):
    """Return y and all gradients of the public function, by name."""
    tensors = (inputs.x, inputs.lora_A, inputs.lora_B, inputs.bias, magnitude)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    x, a, b, bias, m = leaves
    settings = {"scaling": case.scaling, "dropout_p": case.dropout_p, "training": True}
    y = lk.lora_dora_linear(
        x, inputs.weight, a, b, m, bias, seed=inputs.seed, impl=impl, **settings
    )
    names = [name for name, t in zip(GRADIENTS, leaves, strict=True) if t is not None]
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], inputs.dy)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def reference_results(case, inputs, magnitude, dtype=None):
    """Return the reference's, its tensors in `dtype` if there is one."""
    call = call_of(case, inputs, magnitude, dtype)
    x, dy = (t if dtype is None else t.to(dtype) for t in (inputs.x, inputs.dy))
    y, *kept = reference.forward(x, call)
    wanted = DoraWanted(True, True, True, inputs.bias is not None, True)
    grads = reference.backward(dy, Kept(x, *kept), call, wanted)
    found = {"y": y, **dict(zip(GRADIENTS, grads, strict=True))}
    return {name: t for name, t in found.items() if t is not None}


def assert_dora_parity(case, impl, problem=None):
    """Check y and all gradients of one implementation against float64, within the budget."""
    inputs, magnitude = problem or make_dora_inputs(case)
    oracle = reference_results(case, inputs, magnitude, torch.float64)
    errors, fewest = [_errors(case, inputs, magnitude)], min(t.numel() for t in oracle.values())
    for _ in range(MANY_DRAWS if fewest < FEW_SUMS else MORE_DRAWS):
        errors.append(_errors(case, *make_dora_inputs(case)))
    actual = results(case, inputs, magnitude, impl)
    assert actual.keys() == oracle.keys()
    for name, result in actual.items():
        what = f"{name} of {impl}, {case}"
        assert_within_budget(result, oracle[name], [e[name] for e in errors], what)


def _errors(case, inputs, magnitude):
    oracle = reference_results(case, inputs, magnitude, torch.float64)
    same = reference_results(case, inputs, magnitude)
    return {name: same[name].double() - oracle[name] for name in oracle}

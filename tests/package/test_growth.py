"""What CONTRIBUTING says a new op touches is all that it touches."""

import os
import re
import shutil
import subprocess
import sys

from tests.support.paths import ROOT

# A layer without a weight: y = scaling · x Aᵀ. The files that CONTRIBUTING names, and no other.
REFERENCE = '''
"""y = scaling · x Aᵀ in plain torch."""

def forward(x, a, scaling):
    return x @ a.T * scaling

def backward(dy, x, a, scaling):
    return dy @ a * scaling, dy.T @ x * scaling
'''
OP = '''
"""`toy`: y = scaling · x Aᵀ."""

import torch

from lora_kernels.dispatch import IMPLEMENTATIONS, choose
from lora_kernels.registration import Direction, below_autograd, operators, register

def _check(*tensors_and_scaling):
    *tensors, scaling = tensors_and_scaling
    if any(t.ndim != 2 for t in tensors):
        raise ValueError("x, a: expected matrices")

def _compute(impl, body, *args):
    _check(*args)
    return body(*args)

def _cast(impl, dtype, *args):
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) else t for t in args)

def _fake_forward(impl, x, a, scaling):
    return x.new_empty(x.shape[0], a.shape[0])

def _fake_backward(impl, dy, x, a, scaling):
    return torch.empty_like(x), torch.empty_like(a)

def _recorded_forward(both, x, a, scaling):
    return Toy.apply(x, a, scaling, both)

def _recorded_backward(both, *args):
    return below_autograd(both.backward, *args)

register(
    "toy", "toy",
    Direction("forward", "(Tensor x, Tensor a, float scaling) -> Tensor",
              _fake_forward, _compute, _check, _cast, _recorded_forward),
    Direction("backward",
              "(Tensor dy, Tensor x, Tensor a, float scaling) -> (Tensor dx, Tensor da)",
              _fake_backward, _compute, _check, _cast, _recorded_backward),
)
_OPERATORS = {i.name: operators("toy", i.name) for i in IMPLEMENTATIONS}

class Toy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, scaling, both):
        ctx.save_for_backward(x, a)
        ctx.rest = scaling, both
        return below_autograd(both.forward, x, a, scaling)

    @staticmethod
    def backward(ctx, dy):
        scaling, both = ctx.rest
        return *below_autograd(both.backward, dy, *ctx.saved_tensors, scaling), None, None

def toy(x, a, scaling=1.0, impl="auto"):
    chosen = choose(impl, ("toy", x.device, x.dtype, a.shape[0], False, "dense"))
    return Toy.apply(x, a, scaling, _OPERATORS[chosen.name])
'''
SPEC = '''
"""Cases, inputs, call and oracle of `toy`."""

from dataclasses import dataclass

import torch

from lora_kernels.impl.reference import toy as reference
from lora_kernels.ops.toy import toy
from lora_kernels.testing.spec import Spec

@dataclass(frozen=True)
class Case:
    m: int
    k: int
    rank: int
    dtype: torch.dtype = torch.float32
    dropout_p: float = 0.0
    results = ("y", "dx", "da")

    @property
    def multiplications(self):
        return self.m * self.k * self.rank

    between = multiplications

def inputs(case, device=None):
    shapes = (case.m, case.k), (case.rank, case.k), (case.m, case.rank)
    return [torch.randn(shape, device=device).to(case.dtype) for shape in shapes]

def call(case, inputs, impl, wanted=("dx", "da"), form="dense", scaling=2.0):
    x, a = (t.requires_grad_() for t in inputs[:2])
    y = toy(x, a, scaling, impl)
    return dict(zip(case.results, (y.detach(), *torch.autograd.grad(y, (x, a), inputs[2]))))

def oracle(case, inputs, dtype=None, wanted=None):
    x, a, dy = (t.detach() if dtype is None else t.detach().to(dtype) for t in inputs)
    results = reference.forward(x, a, 2.0), *reference.backward(dy, x, a, 2.0)
    return dict(zip(case.results, results))

TOY = Spec("toy", lambda: {"sizes": [Case(5, 7, 3), Case(64, 8, 2, torch.bfloat16)]},
           inputs, call, oracle)
'''
USE = """
import pytest, torch
import lora_kernels as lk
from lora_kernels.ops.toy import toy

x, a = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 7), (3, 7)))
assert lk.__file__.startswith({folder!r}), lk.__file__
assert torch.autograd.gradcheck(lambda x, a: toy(x, a, 2.0), (x, a))
operator = torch.ops.lora_kernels.toy_forward_reference.default
torch.library.opcheck(operator, (x.detach(), a.detach(), 2.0))
torch.testing.assert_close(torch.compile(toy, fullgraph=True, backend="aot_eager")(x, a), toy(x, a))
with torch.autocast("cpu", torch.bfloat16):
    assert operator(x.float(), a.float(), 2.0).dtype == torch.bfloat16
with pytest.raises(ValueError, match="'eager' can't serve this call: has no toy"):
    toy(x, a, impl="eager")
with pytest.raises(ValueError, match="expected matrices"):
    operator(x[0], a, 2.0)
y = lk.lora_linear(x, torch.eye(7).double(), a, torch.zeros(7, 3).double())
torch.testing.assert_close(y, x)

from lora_kernels.testing import SPECS
for case in SPECS[-1].cases()["sizes"]:
    inputs = SPECS[-1].inputs(case)
    SPECS[-1].assert_parity(case, inputs, "reference")
    wrong = SPECS[-1].call(case, inputs, "reference", scaling=2.1)
    with pytest.raises(AssertionError, match="budget"):
        SPECS[-1].assert_results(case, inputs, wrong, "reference")
"""


def test_a_new_op_touches_the_files_that_contributing_names(tmp_path):
    package = tmp_path / "lora_kernels"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "lora_kernels", package, ignore=ignored)
    support = package / "impl" / "reference" / "support.py"
    given = support.read_text()
    support.write_text(given.replace("OPS = {", 'OPS = {"toy": ("dense",), ', 1))
    assert support.read_text() != given
    (package / "impl" / "reference" / "toy.py").write_text(REFERENCE)
    (package / "ops" / "toy.py").write_text(OP)
    (package / "testing" / "toy.py").write_text(SPEC)
    specs = package / "testing" / "__init__.py"
    imported = (
        "from lora_kernels.testing.toy import TOY\nSPECS = (LINEAR, DORA, GROUPED, MIXED, TOY)"
    )
    specs.write_text(specs.read_text().replace("SPECS = (LINEAR, DORA, GROUPED, MIXED)", imported))
    steps = (ROOT / "CONTRIBUTING.md").read_text().partition("## To add an op\n")[2]
    steps = steps.partition("\n## ")[0]
    for name in (
        "ops/<op>.py", "impl/<name>/<op>.py", "impl/<name>/support.py", "testing/<op>.py"
    ):  # fmt: skip
        assert f"`{name}`" in steps
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", USE.format(folder=str(tmp_path))],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_contributing_names_files_that_exist():
    """Of the steps to add something, but for what stands between angle brackets."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    steps = text[text.index("## To add an op\n") :]
    for name in re.findall(r"`([a-z_/]+\.(?:py|h|md|json|cuh))`", steps):
        inside = (ROOT / "lora_kernels").rglob(name)
        assert (ROOT / name).exists() or any(inside), name

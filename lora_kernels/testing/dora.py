"""Cases, inputs, call and float64 oracle of `lora_dora_linear`, beside those of `lora_linear`."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lora_kernels.impl.reference import dora as reference
from lora_kernels.operands.call import Adapter, LinearCall
from lora_kernels.operands.dora import DoraCall, DoraWanted, Kept
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.weight import Dense
from lora_kernels.ops.dora import lora_dora_linear
from lora_kernels.testing.linear import BF16, FP16, FP32, Case, Inputs, make_inputs
from lora_kernels.testing.spec import Results, Spec

DORA_GRADIENTS = ("dx", "da", "db", "dbias", "dm")


@dataclass(frozen=True)
class DoraCase(Case):
    """A case of the linear layer, its rows rescaled."""

    @property
    def results(self) -> tuple[str, ...]:
        """The names of y and the gradients."""
        return (*super().results, "dm")


@dataclass
class DoraInputs(Inputs):
    """The tensors of a call; the magnitude has the adapters' dtype."""

    magnitude: Tensor


def make_dora_inputs(case: DoraCase, device: torch.device | str | None = None) -> DoraInputs:
    """Draw inputs as `make_inputs` does, and gains between .5 and 1.5, one 0 and one negative."""
    inputs = make_inputs(case, device)
    adapter = Adapter(inputs.lora_A, inputs.lora_B, case.scaling)
    norm = reference.row_norms(LinearCall(Dense(inputs.weight), adapter, None, None))
    magnitude = norm * (0.5 + torch.rand(case.n, device=device))
    if case.n > 2:
        magnitude[0], magnitude[1] = 0.0, -magnitude[1]
    return DoraInputs(**vars(inputs), magnitude=magnitude.to(inputs.lora_A.dtype))


def dora_call(case: DoraCase, inputs: DoraInputs, dtype: torch.dtype | None = None) -> DoraCall:
    """Return the call of a case's inputs, its tensors in `dtype` if there is one."""

    def cast(t: Tensor) -> Tensor:
        return t if dtype is None else t.to(dtype)

    w, a, b, m = map(cast, (inputs.weight, inputs.lora_A, inputs.lora_B, inputs.magnitude))
    bias = None if inputs.bias is None else cast(inputs.bias)
    dropout = drawn(case.dropout_p, inputs.seed, w.device)
    return DoraCall(LinearCall(Dense(w), Adapter(a, b, case.scaling), bias, dropout), m)


def _sizes() -> list[DoraCase]:
    """Every dtype with R and dropout; M, N and K go round.

    One column's W and s B A cancel in some draws, whose errors say nothing of others.
    """
    sides, rows = (
        ((64, 129), (7, 136), (136, 64), (1, 129), (129, 200), (65, 7)),
        (1, 7, 33, 150, 17),
    )
    cases = []
    for index, (dtype, r, p) in enumerate(product((FP32, BF16, FP16), (1, 5, 16, 96), (0.0, 0.1))):
        n, k = sides[(index + index // 6) % len(sides)]
        m, adapters = rows[index % len(rows)], FP32 if dtype != FP32 and index % 5 == 0 else None
        cases.append(DoraCase((m,), n, k, r, dtype, adapters, p, bias=index % 3 != 0))
    return cases


def cases() -> dict[str, list[DoraCase]]:
    """Return what every implementation is checked on, by kind."""
    return {
        "sizes": _sizes(),
        "leading dimensions": [
            DoraCase((), 40, 24, 5, dropout_p=0.3),
            DoraCase((2, 1, 9), 40, 24, 5, dropout_p=0.3, bias=False),
            DoraCase((4, 0), 40, 24, 5),
        ],
        "adapters": [
            DoraCase((3, 20), 72, 136, 8, BF16, FP32),
            DoraCase((3, 20), 72, 136, 8, BF16, torch.float64, 0.1),
            DoraCase((3, 20), 72, 136, 8, FP16, FP32, 0.1),
            DoraCase((65,), 48, 72, 8, FP32, BF16, 0.1),
            DoraCase((17,), 65, 64, 256),
        ],
        "layers": [
            DoraCase((270,), 4100, 16, 8, FP32, dropout_p=0.05),  # more than a block of D(x)
            DoraCase((40,), 512, 600, 16, BF16),
            DoraCase((130,), 640, 2048, 16, FP32),
        ],
    }


def run(
    case: DoraCase,
    inputs: DoraInputs,
    impl: str,
    wanted: tuple[str, ...] = DORA_GRADIENTS,
    form: str = "dense",
) -> Results:
    """Return y and the wanted gradients of the public function, by name; W is dense."""
    assert form == "dense", form
    tensors = (inputs.x, inputs.lora_A, inputs.lora_B, inputs.bias, inputs.magnitude)
    leaves = {
        name: t.detach().requires_grad_(name in wanted)
        for name, t in zip(DORA_GRADIENTS, tensors, strict=True)
        if t is not None
    }
    y = lora_dora_linear(
        leaves["dx"], inputs.weight, leaves["da"], leaves["db"], leaves["dm"], leaves.get("dbias"),
        scaling=case.scaling, dropout_p=case.dropout_p, training=True, seed=inputs.seed, impl=impl,
    )  # fmt: skip
    asked = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(asked.values()), inputs.dy)
    return {"y": y.detach(), **dict(zip(asked, grads, strict=True))}


def reference_results(
    case: DoraCase,
    inputs: DoraInputs,
    dtype: torch.dtype | None = None,
    wanted: tuple[str, ...] | None = None,
) -> Results:
    """Return the reference's results with every tensor in `dtype`; None keeps the case's dtypes.

    wanted: names of results, None for all.
    """
    call = dora_call(case, inputs, dtype)
    x, dy = (t if dtype is None else t.to(dtype) for t in (inputs.x, inputs.dy))
    wanted = case.results if wanted is None else wanted
    y, *kept = reference.forward(x, call)
    asked = DoraWanted(*(name in wanted for name in DORA_GRADIENTS))
    grads = reference.backward(dy, Kept(x, *kept), call, asked)
    results = dict(zip(("y", *DORA_GRADIENTS), (y, *grads), strict=True))
    return {name: t for name, t in results.items() if name in wanted and t is not None}


DORA = Spec("lora_dora_linear", cases, make_dora_inputs, run, reference_results)

"""Inputs, float64 oracle and error budget for parity checks; pytest-free, so benchmarks use it too.

The budget is derived, not tuned: an implementation may err twice as much as same-dtype eager
PyTorch (`reference` in that dtype), both measured against the float64 oracle, plus one rounding of
the largest element. The root mean square is held to the same rule, which catches broad drift that a
maximum hides. Where torch's switch lets float32 products be TF32's, eager's are.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.impl import gpu
from lora_kernels.impl.reference import linear as reference
from lora_kernels.operands.call import Adapter, LinearCall, Wanted
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.weight import Dense
from lora_kernels.ops.linear import lora_linear

FEW_ELEMENTS, MORE_DRAWS = 1 << 17, 7
# Where xa has so few elements, one rounding of it decides the errors of y and db: against seven
# more draws torch's own results failed in 0.4 % of runs (1-7-129, R = 1). A result that has so few
# itself is as much a matter of luck (736-1-7, R = 1).
FEW_SUMS, MANY_DRAWS = 64, 31
GRADIENTS = ("dx", "da", "db", "dbias")


class Sizes(NamedTuple):
    """Factors on what `make_inputs` draws; `first_row`: on the first row of dy, on the last 1."""

    x: float = 1.0
    weight: float = 1.0
    a: float = 1.0
    b: float = 1.0
    dy: float = 1.0
    first_row: float = 1.0

    def __str__(self) -> str:
        return "".join(f"-{name}{size:g}" for name, size in self._asdict().items() if size != 1.0)


USUAL = Sizes()


@dataclass(frozen=True)
class Case:
    """One parity problem: x is [*leading, k], the weight [n, k], the rank r."""

    leading: tuple[int, ...]
    n: int
    k: int
    r: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None  # None: x's
    dropout_p: float = 0.0
    bias: bool = True
    scaling: float = 1.7
    sizes: Sizes = USUAL

    def __str__(self) -> str:
        m = "x".join(map(str, self.leading)) or "-"
        adapters = f"+{str(self.adapter_dtype)[6:]}" if self.adapter_dtype else ""
        text = f"{m}-{self.n}-{self.k}-r{self.r}-{str(self.dtype)[6:]}{adapters}-p{self.dropout_p}"
        return text if self.sizes == USUAL else f"{text}-s{self.scaling:g}{self.sizes}"


@dataclass
class Inputs:
    """The tensors of a call and the gradient of its result; `seed` keys the dropout mask."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dy: Tensor
    seed: int


def make_inputs(case: Case, device: torch.device | str | None = None) -> Inputs:
    """Draw inputs from torch's generator, scaled so that every term of y is of order one.

    They lie on `device`, or on torch's default one.

    lora_B is not zero, as it is at the start of training: that would hide half of the errors.
    """

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype or case.dtype)

    adapter, sizes = case.adapter_dtype or case.dtype, case.sizes
    inputs = Inputs(
        x=normal(*case.leading, case.k, scale=sizes.x),
        weight=normal(case.n, case.k, scale=sizes.weight * case.k**-0.5),
        lora_A=normal(case.r, case.k, scale=sizes.a * case.k**-0.5, dtype=adapter),
        lora_B=normal(case.n, case.r, scale=sizes.b * case.r**-0.5, dtype=adapter),
        bias=normal(case.n) if case.bias else None,
        dy=normal(*case.leading, case.n, scale=sizes.dy),
        seed=int(torch.randint(0, 1 << 62, ())),
    )
    if sizes.first_row != 1.0:
        rows = inputs.dy.view(-1, case.n)
        rows *= torch.logspace(math.log10(sizes.first_row), 0, rows.shape[0], device=device)[
            :, None
        ]
    return inputs


def float16_range_cases(leading: tuple[int, ...], n: int, k: int, r: int) -> list[Case]:
    """Return cases at both ends of float16's range, in which all results are finite.

    Products by the scaling or by dropout's factor leave it, and so does dxa; where adapters are
    float32, PEFT computes all of these in float32.
    """
    wide = {"adapter_dtype": torch.float32, "bias": False}
    vanishing = Sizes(dy=1e-5, b=1e-4 * r**0.5)  # smaller elements of B are rounded to fewer
    scaled_up, scaled_down = {"scaling": 100.0}, {"scaling": 0.001}
    overflowing = Sizes(x=1000, b=1e-3, dy=1e-4)
    settings: list[dict[str, Any]] = [
        scaled_up | {"sizes": overflowing},
        scaled_up | {"sizes": overflowing, "dropout_p": 0.9},
        scaled_up | {"sizes": Sizes(x=1e-3, b=1e3, dy=1e-3)},
        scaled_down | {"sizes": Sizes(x=1000, weight=1e-6, b=1e-3), "bias": False},
        wide | {"sizes": vanishing},
        wide | {"sizes": vanishing, "dropout_p": 0.9},
        wide | {"sizes": Sizes(dy=1e-6, x=1e-2), "scaling": 0.01},
        wide | {"sizes": Sizes(dy=4096), "dropout_p": 0.1},
        wide | {"sizes": Sizes(dy=512), "dropout_p": 0.9},
        wide | {"sizes": Sizes(b=1e-3, first_row=1e-8), "dropout_p": 0.1},
    ]
    return [Case(leading, n, k, r, torch.float16, **setting) for setting in settings]


def beyond_float16_cases(leading: tuple[int, ...], n: int, k: int, r: int) -> list[Case]:
    """Return cases whose float32 adapter branch leaves float16's range; all results are finite."""
    beyond = (
        Sizes(x=4000, weight=1e-4, a=100, b=1e-6),  # D(x) Aᵀ
        Sizes(x=1e-3, a=1e7, b=1e-5),
        Sizes(x=1e-3, a=1e-3, b=1e6, dy=1e-2),
    )
    return [
        Case(leading, n, k, r, torch.float16, torch.float32, p, bias=False, sizes=sizes)
        for sizes in beyond
        for p in (0.0, 0.5)
    ]


def run(
    case: Case, inputs: Inputs, impl: str, wanted: tuple[str, ...] = GRADIENTS
) -> dict[str, Tensor]:
    """Return y and the wanted gradients of the public function, by name."""
    tensors = (inputs.x, inputs.lora_A, inputs.lora_B, inputs.bias)
    leaves = {
        name: t.detach().requires_grad_(name in wanted)
        for name, t in zip(GRADIENTS, tensors, strict=True)
        if t is not None
    }
    y = lora_linear(
        leaves["dx"],
        inputs.weight,
        leaves["da"],
        leaves["db"],
        leaves.get("dbias"),
        scaling=case.scaling,
        dropout_p=case.dropout_p,
        training=True,
        seed=inputs.seed,
        impl=impl,
    )
    asked = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(asked.values()), inputs.dy)
    return {"y": y.detach(), **dict(zip(asked, grads, strict=True))}


def reference_results(
    case: Case, inputs: Inputs, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the reference's results with every tensor in `dtype`; None keeps the case's dtypes."""

    def cast(t: Tensor) -> Tensor:
        return t if dtype is None else t.to(dtype)

    x, weight, a, b, dy = map(
        cast, (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.dy)
    )
    bias = None if inputs.bias is None else cast(inputs.bias)
    dropout = drawn(case.dropout_p, inputs.seed, x.device)
    call = LinearCall(Dense(weight), Adapter(a, b, case.scaling), bias, dropout)
    y, xa = reference.forward(x, call)
    grads = reference.backward(dy, x, xa, call, Wanted(True, True, True, bias is not None))
    results = dict(zip(("y", *GRADIENTS), (y, *grads), strict=True))
    return {name: t for name, t in results.items() if t is not None}


def assert_parity(case: Case, inputs: Inputs, impl: str) -> None:
    """Check y and all gradients of one implementation against the oracle, within the budget."""
    actual = run(case, inputs, impl)
    assert len(actual) == 4 + case.bias, f"{impl}, {case}: got {', '.join(actual)} only"
    assert_results(case, inputs, actual, impl)


def assert_results(case: Case, inputs: Inputs, actual: dict[str, Tensor], impl: str) -> None:
    """Check results, as `run` returned them, against the oracle, within the budget.

    Eager's error is the largest of a few draws where a result has few elements: there one draw's
    error may be near zero by luck.
    """
    oracle = reference_results(case, inputs, torch.float64)
    eager = eager_results(case, inputs)
    draws = [{name: eager[name].double() - oracle[name] for name in oracle}]
    fewest = min(t.numel() for t in oracle.values())
    if fewest < FEW_ELEMENTS:
        sums = oracle["dx"].numel() // case.k * case.r
        more = MANY_DRAWS if min(sums, fewest) < FEW_SUMS else MORE_DRAWS
        draws += [eager_errors(case, make_inputs(case)) for _ in range(more)]
    for name, result in actual.items():
        what = f"{name} of {impl}, {case}"
        assert result.dtype == eager[name].dtype, f"{what}: dtype {result.dtype}"
        assert_within_budget(result, oracle[name], [errors[name] for errors in draws], what)


def eager_results(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Return the results of same-dtype eager PyTorch, products by TF32 where torch allows them.

    A CPU has none: there the operands of each product are rounded, as a GPU's tensor cores do.
    """
    by_tf32 = case.dtype == torch.float32 and gpu.tf32_allowed()
    with _Tf32Products() if by_tf32 else nullcontext():
        return reference_results(case, inputs)


class _Tf32Products(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            args = tuple(map(to_tf32, args))
        return func(*args, **(kwargs or {}))


def to_tf32(t: Tensor) -> Tensor:
    """Return float32 rounded to TF32's 10 bits of mantissa; another dtype as it is."""
    if t.dtype != torch.float32:
        return t
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def eager_errors(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Return the errors of same-dtype eager PyTorch against the float64 oracle."""
    oracle = reference_results(case, inputs, torch.float64)
    return {name: t.double() - oracle[name] for name, t in eager_results(case, inputs).items()}


def assert_within_budget(actual: Tensor, oracle: Tensor, eager: list[Tensor], what: str) -> None:
    """Check shape, finiteness and error: at most twice eager's plus one rounding.

    Args:
        actual: the result under test.
        oracle: the same in float64.
        eager: errors of same-dtype eager PyTorch, one tensor a draw.
        what: names the result in the message.

    Raises:
        AssertionError: says the error, the budget and the worst element's coordinate.
    """
    assert actual.shape == oracle.shape, f"{what}: shape {actual.shape}, expected {oracle.shape}"
    assert torch.isfinite(actual).all(), f"{what}: NaN or infinity, not written or overflown"
    if oracle.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - oracle).abs()
    budget = 2 * max(e.abs().max() for e in eager) + eps * oracle.abs().max()
    worst = torch.unravel_index(error.argmax(), error.shape)
    assert error.max() <= budget, (
        f"{what}: error {error.max():.3g} at {tuple(int(i) for i in worst)}, budget {budget:.3g}"
    )
    rms_budget = 2 * max(_rms(e) for e in eager) + eps * _rms(oracle)
    assert _rms(error) <= rms_budget, f"{what}: rms {_rms(error):.3g}, budget {rms_budget:.3g}"


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()

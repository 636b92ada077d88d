"""Cases, inputs, call and float64 oracle of `lora_linear`; pytest-free: benchmarks use them too."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.impl.reference import linear as reference
from lora_kernels.operands.call import Adapter, LinearCall, Wanted
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.onednn import OnednnWeight
from lora_kernels.operands.weight import Dense, Weight
from lora_kernels.ops import linear as op
from lora_kernels.testing.spec import Results, Spec

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
GRADIENTS = ("dx", "da", "db", "dbias")
# How each format of `FORMATS` stores a W.
STORE: dict[str, Callable[[Tensor], Weight]] = {
    "dense": Dense,
    "onednn": lambda weight: OnednnWeight(weight, backward=True),
}


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

    @property
    def rank(self) -> int:
        """R."""
        return self.r

    @property
    def multiplications(self) -> int:
        """Of x Wᵀ."""
        return math.prod(self.leading) * self.n * self.k

    @property
    def between(self) -> int:
        """The elements of xa."""
        return math.prod(self.leading) * self.r

    @property
    def results(self) -> tuple[str, ...]:
        """The names of y and the gradients."""
        return ("y", *GRADIENTS) if self.bias else ("y", *GRADIENTS[:3])

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


def _sizes() -> list[Case]:
    """Every dtype with every R, dropout and M; N and K go round, so that all values meet."""
    sides = (1, 7, 64, 129, 136, 200, 384)
    pairs = [*product(sides, sides), (736, 1), (129, 736), (736, 136)]
    every = product(
        (FP32, BF16, FP16), (1, 5, 8, 16, 24, 64, 96, 256), (0.0, 0.1), (1, 7, 64, 129, 300)
    )
    cases = []
    for index, (dtype, r, p, m) in enumerate(every):
        n, k = pairs[(5 * index + index // 16) % len(pairs)]
        adapters = FP32 if dtype != FP32 and index % 5 == 0 else None
        cases.append(Case((m,), n, k, r, dtype, adapters, p, bias=index % 3 != 0))
    return cases


def _leading() -> list[Case]:
    leading = ((), (5,), (3, 7), (2, 1, 9), (4, 0))
    return [
        Case(each, 40, 24, 5, dropout_p=0.3, bias=bias)
        for each in leading
        for bias in (True, False)
    ]


def _adapters() -> list[Case]:
    """Adapters wider than x, and narrower."""
    wider = product((BF16, FP16), (FP32, torch.float64), (0.0, 0.05))
    return [
        *(Case((3, 50), 136, 200, 8, dtype, adapters, p) for dtype, adapters, p in wider),
        Case((65,), 48, 72, 8, FP32, BF16, 0.05),
    ]


def _layers() -> list[Case]:
    """Sizes of real layers."""
    slow = torch.backends.cpu.get_cpu_capability() != "AVX512"
    found = []
    for m, n, k in ((512, 2048, 2048), (2048, 768, 768), (17, 1024, 1100)):
        # torch's own products of bfloat16 would take minutes.
        found += [
            Case((m,), n, k, 16, FP32, dropout_p=0.05),
            Case((max(17, m // 16) if slow else m,), n, k, 16, BF16, dropout_p=0.05),
        ]
    return found


def cases() -> dict[str, list[Case]]:
    """Return what every implementation is checked on, by kind.

    "beyond float16" is for those that keep the branch of wider adapters in float32.
    """
    return {
        "sizes": _sizes(),
        "leading dimensions": _leading(),
        "adapters": _adapters(),
        "float16 range": [
            *float16_range_cases((3,), 72, 136, 5),
            *float16_range_cases((2, 75), 72, 136, 5),
            *float16_range_cases((150,), 72, 136, 96),
        ],
        "beyond float16": [
            *beyond_float16_cases((3,), 72, 136, 5),
            *beyond_float16_cases((2, 65), 72, 136, 5),
        ],
        "layers": _layers(),
    }


def run(
    case: Case,
    inputs: Inputs,
    impl: str,
    wanted: tuple[str, ...] = GRADIENTS,
    form: str = "dense",
) -> Results:
    """Return y and the wanted gradients of the public function, by name.

    form: of W; one that isn't dense is given to the function as modules do.
    """
    tensors = (inputs.x, inputs.lora_A, inputs.lora_B, inputs.bias)
    leaves = {
        name: t.detach().requires_grad_(name in wanted)
        for name, t in zip(GRADIENTS, tensors, strict=True)
        if t is not None
    }
    x, a, b, bias = (leaves.get(name) for name in GRADIENTS)
    assert x is not None
    assert a is not None
    assert b is not None
    if form == "dense":
        y = op.lora_linear(
            x, inputs.weight, a, b, bias, scaling=case.scaling, dropout_p=case.dropout_p,
            training=True, seed=inputs.seed, impl=impl,
        )  # fmt: skip
    else:
        dropout = drawn(case.dropout_p, inputs.seed, x.device)
        adapter = Adapter(a, b, case.scaling)
        y = op.run(x, LinearCall(STORE[form](inputs.weight), adapter, bias, dropout), impl)
    asked = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(asked.values()), inputs.dy)
    return {"y": y.detach(), **dict(zip(asked, grads, strict=True))}


def reference_results(
    case: Case,
    inputs: Inputs,
    dtype: torch.dtype | None = None,
    wanted: tuple[str, ...] | None = None,
) -> Results:
    """Return the reference's results with every tensor in `dtype`; None keeps the case's dtypes.

    wanted: names of results, None for all.
    """

    def cast(t: Tensor) -> Tensor:
        return t if dtype is None else t.to(dtype)

    wanted = case.results if wanted is None else wanted
    x, w, a, b, dy = map(cast, (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.dy))
    bias = None if inputs.bias is None else cast(inputs.bias)
    dropout = drawn(case.dropout_p, inputs.seed, x.device)
    scaling = case.scaling
    if isinstance(scaling, Tensor):
        scaling = scaling.to(x.device)  # the oracle's may be another one than the call's
    call = LinearCall(Dense(w), Adapter(a, b, scaling), bias, dropout)
    # xa alone is that of a layer without outputs.
    asked = (
        call if "y" in wanted else LinearCall(Dense(w[:0]), Adapter(a, b[:0], 1.0), None, dropout)
    )
    y, xa = reference.forward(x, asked)
    grads = reference.backward(dy, x, xa, call, Wanted(*(name in wanted for name in GRADIENTS)))
    results = dict(zip(("y", *GRADIENTS), (y, *grads), strict=True))
    return {name: t for name, t in results.items() if name in wanted and t is not None}


LINEAR = Spec("lora_linear", cases, make_inputs, run, reference_results)
assert_parity, assert_results = LINEAR.assert_parity, LINEAR.assert_results
eager_results, eager_errors = LINEAR.eager, LINEAR.eager_errors

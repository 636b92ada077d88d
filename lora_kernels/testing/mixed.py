"""Cases, inputs, call and float64 oracle of `mixed_lora_linear`; pytest-free."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lora_kernels.impl.reference import mixed as reference
from lora_kernels.operands.call import Wanted
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.mixed import MixedCall
from lora_kernels.ops import mixed as op
from lora_kernels.testing.linear import BF16, FP16, FP32
from lora_kernels.testing.spec import Results, Spec


@dataclass(frozen=True)
class MixedCase:
    """One parity problem: samples of `each` rows with such owners, W [n, k], adapters' ranks.

    apart: whether x, W and the factors lie transposed in memory.
    """

    owners: tuple[int, ...]
    each: int
    n: int
    k: int
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    bias: bool = True
    apart: bool = False

    @property
    def rank(self) -> int:
        """The largest."""
        return max(self.ranks)

    @property
    def rows(self) -> int:
        """M."""
        return len(self.owners) * self.each

    @property
    def multiplications(self) -> int:
        """Of the frozen product."""
        return self.rows * self.n * self.k

    @property
    def between(self) -> int:
        """The elements of xa that count."""
        return max(1, self.each * min(self.ranks))

    @property
    def gradients(self) -> tuple[str, ...]:
        """The names of the gradients, those of each adapter."""
        of_factors = [f"d{f}{i}" for f in "ab" for i in range(len(self.ranks))]
        return ("dx", *of_factors, *(("dbias",) if self.bias else ()))

    @property
    def results(self) -> tuple[str, ...]:
        """The names of y and the gradients."""
        return "y", *self.gradients

    def __str__(self) -> str:
        owners = "".join("_" if o < 0 else str(o) for o in self.owners)
        ranks = "+".join(map(str, self.ranks))
        adapters = f"+{str(self.adapter_dtype)[6:]}" if self.adapter_dtype else ""
        text = f"{owners}x{self.each}-{self.n}-{self.k}-r{ranks}-{str(self.dtype)[6:]}{adapters}"
        return f"{text}-p{self.dropout_p}{'-apart' if self.apart else ''}"


@dataclass
class MixedInputs:
    """The tensors of a call and the gradient of its result; `seed` keys the dropout mask."""

    x: Tensor
    call: MixedCall
    dy: Tensor
    seed: int


def make_inputs(case: MixedCase, device: torch.device | str | None = None) -> MixedInputs:
    """Draw inputs from torch's generator, scaled so that every term of y is of order one."""
    adapter = case.adapter_dtype or case.dtype

    def normal(rows: int, columns: int, scale: float, dtype: torch.dtype) -> Tensor:
        t = (torch.randn(rows, columns, device=device) * scale).to(dtype)
        return t.t().contiguous().t() if case.apart else t

    count = len(case.ranks)
    call = MixedCall(
        normal(case.n, case.k, case.k**-0.5, case.dtype),
        [normal(r, case.k, case.k**-0.5, adapter) for r in case.ranks],
        [normal(case.n, r, r**-0.5, adapter) for r in case.ranks],
        torch.tensor([0.5 + i for i in range(count)], dtype=torch.float64),
        torch.tensor(case.owners, dtype=torch.int32),
        torch.randn(case.n, device=device).to(case.dtype) if case.bias else None,
        None,
    )
    x = normal(case.rows, case.k, 1.0, case.dtype)
    dy = normal(case.rows, case.n, 1.0, case.dtype)
    return MixedInputs(x, call, dy, int(torch.randint(0, 1 << 62, ())))


def run(
    case: MixedCase,
    inputs: MixedInputs,
    impl: str,
    wanted: tuple[str, ...] | None = None,
    form: str = "dense",
) -> Results:
    """Return y and the wanted gradients of a call, by name."""
    wanted = case.gradients if wanted is None else wanted
    given, count = inputs.call, len(case.ranks)
    bias = [] if given.bias is None else [given.bias]
    leaves = {
        name: t.detach().requires_grad_(name in wanted)
        for name, t in zip(case.gradients, [inputs.x, *given.a, *given.b, *bias], strict=True)
    }
    x, *factors = (leaves[name] for name in case.gradients[: 1 + 2 * count])
    call = given._replace(
        a=factors[:count], b=factors[count:], bias=leaves.get("dbias"),
        dropout=drawn(case.dropout_p, inputs.seed, inputs.x.device),
    )  # fmt: skip
    op.check(x, call)
    y = op.run(x, call, impl)
    asked = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(asked.values()), inputs.dy)
    return {"y": y.detach(), **dict(zip(asked, grads, strict=True))}


def reference_results(
    case: MixedCase,
    inputs: MixedInputs,
    dtype: torch.dtype | None = None,
    wanted: tuple[str, ...] | None = None,
) -> Results:
    """Return the reference's results with every tensor in `dtype`; None keeps the case's dtypes."""

    def cast(t: Tensor) -> Tensor:
        return t if dtype is None else t.to(dtype)

    given = inputs.call
    call = given._replace(
        weight=cast(given.weight),
        a=list(map(cast, given.a)),
        b=list(map(cast, given.b)),
        bias=None if given.bias is None else cast(given.bias),
        dropout=drawn(case.dropout_p, inputs.seed, inputs.x.device),
    )
    x, dy = cast(inputs.x), cast(inputs.dy)
    y, xa = reference.forward(x, call)
    dx, da, db, dbias = reference.backward(dy, x, xa, call, Wanted(True, True, True, case.bias))
    found = [y, dx, *da, *db, *([] if dbias is None else [dbias])]
    named = dict(zip(case.results, found, strict=True))
    kept = case.results if wanted is None else wanted
    return {name: t for name, t in named.items() if t is not None and name in kept}


def cases() -> dict[str, list[Any]]:
    """Return what every implementation is checked on, by kind."""
    dtypes = ((FP32, None), (BF16, None), (BF16, FP32), (FP16, FP32))
    # One after the other, scattered, one alone, some without an adapter, an adapter without rows.
    owners = ((0, 0, 1, 2), (2, 0, -1, 1, 0, 2), (1,), (-1, 2, 2))
    sizes = [
        MixedCase(
            who, each, n, k, (8, 3, 16), dtype, adapters, p, bias=i % 2 == 0, apart=i % 3 == 1
        )
        for i, ((dtype, adapters), who, each, p, (n, k)) in enumerate(
            product(dtypes, owners, (1, 17), (0.0, 0.2), ((72, 40), (33, 129)))
        )
        if i % 5 == 0
    ]
    few = [MixedCase((0,) * m, 1, 72, 40, (12, 8), t) for m in (1, 4, 5) for t in (FP32, BF16)]
    return {"sizes": sizes, "few rows": few, "none": [MixedCase((0, 1), 0, 16, 8, (2, 1))]}


MIXED = Spec(op.OP, cases, make_inputs, run, reference_results)

"""Cases, inputs, call and float64 oracle of `grouped_lora_linear`; pytest-free."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lora_kernels.impl.reference import grouped as reference
from lora_kernels.operands.call import Adapter, Wanted
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.grouped import GroupedCall, Groups
from lora_kernels.ops import grouped as op
from lora_kernels.testing.linear import BF16, FP16, FP32, GRADIENTS
from lora_kernels.testing.spec import Results, Spec


@dataclass(frozen=True)
class GroupedCase:
    """One parity problem: groups of so many rows, weights [G, n, k], rank r.

    spare: sorted rows that no group has. tokens: rows of x that sorted rows read, drawn; None:
    their own. scatter: whether y's rows are shuffled. stored: whether W lies as [G, k, n] and B as
    PEFT has it. adapters, weights: each group's number, None for its own.
    """

    sizes: tuple[int, ...]
    n: int
    k: int
    r: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    bias: bool = True
    scaling: float | tuple[float, ...] = 1.7
    spare: int = 0
    tokens: int | None = None
    scatter: bool = False
    stored: bool = False
    adapters: tuple[int, ...] | None = None
    weights: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.r

    @property
    def count(self) -> int:
        """S."""
        return sum(self.sizes) + self.spare

    @property
    def multiplications(self) -> int:
        """Of the frozen products."""
        return self.count * self.n * self.k

    @property
    def between(self) -> int:
        """The elements of xa."""
        return max(1, sum(self.sizes)) * self.r

    @property
    def results(self) -> tuple[str, ...]:
        """The names of y and the gradients."""
        return ("y", *GRADIENTS) if self.bias else ("y", *GRADIENTS[:3])

    def __str__(self) -> str:
        groups = "+".join(map(str, self.sizes)) or "0"
        adapters = f"+{str(self.adapter_dtype)[6:]}" if self.adapter_dtype else ""
        marks = [
            f"spare{self.spare}" if self.spare else "",
            f"rows{self.tokens}" if self.tokens is not None else "",
            *("scatter" if self.scatter else "", "stored" if self.stored else ""),
            *("adapters" if self.adapters else "", "weights" if self.weights else ""),
        ]
        text = f"{groups}-{self.n}-{self.k}-r{self.r}-{str(self.dtype)[6:]}{adapters}"
        return "-".join([f"{text}-p{self.dropout_p}", *filter(None, marks)])


@dataclass
class GroupedInputs:
    """The tensors of a call and the gradient of its result; `seed` keys the dropout mask."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    groups: Groups
    scaling: float | Tensor
    dy: Tensor
    seed: int


def make_inputs(case: GroupedCase, device: torch.device | str | None = None) -> GroupedInputs:
    """Draw inputs from torch's generator, scaled so that every term of y is of order one."""

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype or case.dtype)

    def numbers(given: tuple[int, ...] | None) -> Tensor | None:
        return torch.tensor(given, dtype=torch.int32, device=device) if given else None

    n, k, r, adapter = case.n, case.k, case.r, case.adapter_dtype or case.dtype
    bases = max(case.weights, default=0) + 1 if case.weights else len(case.sizes)
    owners = max(case.adapters, default=0) + 1 if case.adapters else len(case.sizes)
    weight = normal(bases, n, k, scale=k**-0.5)
    b = normal(owners, n, r, scale=r**-0.5, dtype=adapter)
    if case.stored:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        b = b.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    rows = None
    if case.tokens is not None:
        rows = torch.randint(0, case.tokens, (case.count,), device=device)
    offsets = torch.tensor(case.sizes, device=device).cumsum(0).to(torch.int32)
    groups = Groups(
        offsets, rows, torch.randperm(case.count, device=device) if case.scatter else None,
        numbers(case.adapters), numbers(case.weights),
    )  # fmt: skip
    scaling = case.scaling
    return GroupedInputs(
        x=normal(case.count if case.tokens is None else case.tokens, k),
        weight=weight,
        lora_A=normal(owners, r, k, scale=k**-0.5, dtype=adapter),
        lora_B=b,
        bias=normal(bases, n) if case.bias else None,
        groups=groups,
        scaling=torch.tensor(scaling, device=device) if isinstance(scaling, tuple) else scaling,
        dy=normal(case.count, n),
        seed=int(torch.randint(0, 1 << 62, ())),
    )


def run(
    case: GroupedCase,
    inputs: GroupedInputs,
    impl: str,
    wanted: tuple[str, ...] = GRADIENTS,
    form: str = "dense",
) -> Results:
    """Return y and the wanted gradients of the public function, by name."""
    tensors = (inputs.x, inputs.lora_A, inputs.lora_B, inputs.bias)
    leaves = {
        name: t.detach().requires_grad_(name in wanted)
        for name, t in zip(GRADIENTS, tensors, strict=True)
        if t is not None
    }
    x, a, b = (leaves[name] for name in GRADIENTS[:3])
    offsets, *groups = inputs.groups
    y = op.grouped_lora_linear(
        x, inputs.weight, a, b, offsets, leaves.get("dbias"),
        **dict(zip(Groups._fields[1:], groups, strict=True)), scaling=inputs.scaling,
        dropout_p=case.dropout_p, training=True, seed=inputs.seed, impl=impl,
    )  # fmt: skip
    asked = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(asked.values()), inputs.dy)
    return {"y": y.detach(), **dict(zip(asked, grads, strict=True))}


def reference_results(
    case: GroupedCase,
    inputs: GroupedInputs,
    dtype: torch.dtype | None = None,
    wanted: tuple[str, ...] | None = None,
) -> Results:
    """Return the reference's results with every tensor in `dtype`; None keeps the case's dtypes."""

    def cast(t: Tensor) -> Tensor:
        return t if dtype is None else t.to(dtype)

    wanted = case.results if wanted is None else wanted
    x, w, a, b, dy = map(cast, (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.dy))
    bias = None if inputs.bias is None else cast(inputs.bias)
    dropout = drawn(case.dropout_p, inputs.seed, x.device)
    adapter = Adapter(a, b, inputs.scaling)
    call = GroupedCall(w, adapter, bias, inputs.groups, dropout, len(x))
    y, xa = reference.forward(x, call)
    grads = reference.backward(dy, x, xa, call, Wanted(*(name in wanted for name in GRADIENTS)))
    results = dict(zip(("y", *GRADIENTS), (y, *grads), strict=True))
    return {name: t for name, t in results.items() if name in wanted and t is not None}


def cases() -> dict[str, list[Any]]:
    """Return what every implementation is checked on, by kind."""
    dtypes = ((FP32, None), (BF16, None), (FP16, None), (BF16, FP32), (FP16, FP32))
    ragged, balanced = (5, 0, 33, 1, 70), (17, 17, 17, 17)
    sizes = [
        GroupedCase(groups, n, k, r, dtype, adapters, p, bias=index % 2 == 0)
        for index, ((dtype, adapters), r, p, groups, (n, k)) in enumerate(
            product(
                dtypes, (1, 4, 5, 16, 96), (0.0, 0.1), (ragged, balanced), ((72, 40), (33, 129))
            )
        )
        if index % 7 == 0
    ]
    shapes = [(0, 0, 9), (9, 0, 0), (0,), (1,) * 64, (40,), (3, 0, 0, 200)]
    shapes += [(1, 0, 2) * 43]
    return {
        "sizes": sizes,
        "groups": [GroupedCase(each, 24, 24, 3, spare=i % 3) for i, each in enumerate(shapes)],
        "rows": [
            GroupedCase(
                ragged, 40, 48, 4, dtype, None, p, spare=spare, tokens=tokens, scatter=scatter,
                stored=spare > 0,
            )
            for dtype, p, spare, tokens, scatter in product(
                (FP32, BF16), (0.0, 0.2), (0, 7), (None, 30), (False, True)
            )
            if (dtype == BF16) == (p > 0.0)
        ],
        "adapters": [
            GroupedCase(
                ragged, 24, 40, 4, dtype, FP32, 0.1, scaling=(0.5, 1.0, 2.0),
                adapters=(2, 0, -1, 2, 1), weights=weights, stored=True,
            )
            for dtype in (FP32, BF16)
            for weights in (None, (0, 0, 0, 0, 0), (1, 0, 1, 0, 2))
        ],
    }  # fmt: skip


GROUPED = Spec("grouped_lora_linear", cases, make_inputs, run, reference_results)

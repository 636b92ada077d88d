"""What the parity suite runs: every implementation, format of W and executor of this process."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lora_kernels.dispatch import IMPLEMENTATIONS, refusal
from lora_kernels.impl.executor import using
from lora_kernels.operands.request import Request
from lora_kernels.prepack import reason_left
from lora_kernels.testing import STORE
from tests.support import cuda_executors
from tests.support.cuda_executors import A100, RTX3090
from tests.support.implementations import IMPLS, needs_gpu

BF16, FP32 = torch.bfloat16, torch.float32
_OPS = {i.name: i.ops for i in IMPLEMENTATIONS}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
elsewhere = pytest.mark.skipif(INTERPRETED, reason="runs where TRITON_INTERPRET is unset")
# A virtual machine and an interpreter take seconds for so many, and for larger ranks.
MOST_MULTIPLICATIONS, MOST_RANKS = 50_000_000, 96


@dataclass(frozen=True)
class Target:
    """An implementation with a format of W, and where it runs.

    memory: the device of tensors. running: the number of a case -> a context in which calls run
    there. step, first: of the "sizes" one in `step` is taken, from the `first`; `sampled`: of other
    kinds, too. plain: whether torch computes, of whose results few are enough for one run.
    kernels: whether cases are few and small, as a GPU's kernels are executed slowly.
    without_bf16: Triton 3.8's interpreter computes it wrongly, oneDNN doesn't pack it everywhere.
    """

    impl: str
    form: str
    memory: str
    running: Callable[[int], AbstractContextManager[Any]]
    step: int = 1
    first: int = 0
    sampled: bool = False
    kernels: bool = False
    plain: bool = False
    without_bf16: bool = False

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return a dtype for a test that any serves, in which this target computes."""
        return FP32 if self.without_bf16 and dtype == BF16 else dtype

    def takes(self, kind: str, case: Any) -> bool:
        """Whether a case is for this target at all."""
        if not self.kernels:
            return True
        return (
            kind != "beyond float16"  # they round adapters to float16
            and case.multiplications <= MOST_MULTIPLICATIONS
            and case.rank <= MOST_RANKS
            and self.dtype(case.dtype) == case.dtype
        )

    def skip_if_refused(self, spec: Any, case: Any) -> None:
        """Skip what the implementation says it doesn't serve."""
        request = Request(
            spec.op, torch.device(self.memory), case.dtype, case.rank, case.dropout_p > 0, self.form
        )
        reason = refusal(self.impl, request)
        if reason is None and self.form == "onednn":
            reason = reason_left(torch.empty(1, 1, dtype=case.dtype))
        if reason is not None:
            pytest.skip(f"{self.impl}, {self.form}: {reason}")


def _on_host() -> Iterator[Any]:
    """Yield those that need no executor, where tensors of a test lie by default."""
    # Codes have no W that they were made of: tests/ops/test_quantised.py draws them.
    formats = {i.name: STORE.keys() & i.ops["lora_linear"] for i in IMPLEMENTATIONS}
    unpacked = reason_left(torch.empty(1, 1, dtype=BF16)) is not None
    for impl in IMPLS:
        places = (("cpu", "", elsewhere), ("cuda", "-gpu", needs_gpu))
        for memory, name, mark in places[: 1 if impl == "cpu" else 2]:
            for form in sorted(formats[impl]):
                target = Target(
                    impl, form, memory, lambda _, memory=memory: torch.device(memory),
                    step=1 if form == "dense" else 3, sampled=form != "dense",
                    without_bf16=form == "onednn" and unpacked, plain=impl != "cpu",
                )  # fmt: skip
                suffix = "" if form == "dense" else f"-{form}"
                yield pytest.param(target, id=f"{impl}{suffix}{name}", marks=[mark])


def _of_triton() -> Iterator[Any]:
    if importlib.util.find_spec("triton") is None:
        missing = pytest.mark.skip(reason="needs Triton")
        yield pytest.param(Target("triton", "dense", "cpu", using), id="triton", marks=[missing])
        return
    from tests.support.executors import PLANS, Machine, executors, running

    shares = {
        "interpreter": (2, 0),
        "sm_80": (4, 0),
        "sm_90": (12, 1),
        "sm_100": (12, 6),
        "gpu": (3, 1),
    }
    for executor in executors():
        place = executor.values[0]

        def run(number: int, place: Any = place) -> Any:
            made = place(plan=PLANS[number % len(PLANS)])
            if isinstance(made, Machine):
                made.resident, made.seed = 1 + number % 7, number
                made.weak = int(number % 3 == 0)
            return running(made)

        step, first = shares.get(executor.id, (4, 3))
        yield pytest.param(
            Target(
                "triton", "dense", place.memory, run, step, first, sampled=True, kernels=True,
                without_bf16=executor.id == "interpreter",
            ),
            id=f"triton-{executor.id}", marks=[*executor.marks, pytest.mark.many],
        )  # fmt: skip


def _of_cuda() -> Iterator[Any]:
    for executor in cuda_executors.EXECUTORS:
        place = executor.values[0]

        def run(number: int, place: Any = place) -> Any:
            return place(
                resident=1 + number % 7, seed=number, weak=int(number % 3 == 0),
                shared_bytes=(A100, RTX3090)[number // 2 % 2],
            )  # fmt: skip

        marks = [*executor.marks, cuda_executors.needs_part, elsewhere, pytest.mark.many]
        target = Target(
            "cuda", "dense", place.memory, run, step=3, first=2, sampled=True, kernels=True
        )
        yield pytest.param(target, id=f"cuda-{executor.id}", marks=marks)


HOSTS = [*_on_host()]
TARGETS = [*HOSTS, *_of_triton(), *_of_cuda()]


def pairs(specs: Any) -> list[Any]:
    """Return each spec's cases with each target that takes it: (spec, target, case, number).

    Those that haven't the op, or read no such W, aren't among them.
    """
    found = []
    for spec in specs:
        for given in TARGETS:
            target, number = given.values[0], 0
            if target.form not in _OPS[target.impl].get(spec.op, ()):
                continue
            for kind, cases in spec.cases().items():
                step, first = (1, 0) if kind != "sizes" and not target.sampled else (
                    target.step, target.first
                )  # fmt: skip
                for case in cases[first::step]:
                    if target.takes(kind, case):
                        name = f"{spec.op}-{given.id}-{kind}-{case}"
                        values = (spec, target, case, number)
                        few = target.plain and kind in ("sizes", "layers")
                        marks = [*given.marks, *([pytest.mark.many] if few else ())]
                        found.append(pytest.param(*values, id=name, marks=marks))
                        number += 1
    return found

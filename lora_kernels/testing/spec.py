"""What checks and benchmarks know of an op: its cases, their inputs, the call and the oracle."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_kernels.testing.budget import assert_within_budget, more_draws, products_as_allowed

Results = dict[str, Tensor]


class AnyCase(Protocol):
    """The numbers of a call: sizes, dtypes, dropout; each op has a class of its own."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of x."""

    @property
    def rank(self) -> int:
        """R."""

    @property
    def dropout_p(self) -> float:
        """The probability of dropout."""

    @property
    def multiplications(self) -> int:
        """Of the frozen product, which a machine without a GPU takes its time for."""

    @property
    def between(self) -> int:
        """The elements of the smallest tensor between two products."""

    @property
    def results(self) -> tuple[str, ...]:
        """The names of all results."""


class Oracle(Protocol):
    """The reference's results, by name."""

    def __call__(
        self,
        case: Any,
        inputs: Any,
        dtype: torch.dtype | None = None,
        wanted: tuple[str, ...] | None = None,
    ) -> Results:
        """Compute with every tensor in `dtype`, None keeps theirs; `wanted`: of the results."""


@dataclass(frozen=True)
class Spec:
    """An op, as whoever checks or measures implementations of it needs it.

    op: the word of `OPS`. cases: what every implementation is checked on, by kind. inputs: draws a
    case's tensors, on a device. call: case, inputs, implementation, gradients wanted and format of
    W to the results of the public function, by name. oracle: the reference's results.
    """

    op: str
    cases: Callable[[], dict[str, list[Any]]]
    inputs: Callable[..., Any]
    call: Callable[..., Results]
    oracle: Oracle

    def eager(self, case: AnyCase, inputs: Any) -> Results:
        """Return the results of same-dtype eager PyTorch, products by TF32 where torch allows."""
        with products_as_allowed(case.dtype):
            return self.oracle(case, inputs)

    def eager_errors(self, case: AnyCase, inputs: Any) -> Results:
        """Return the errors of same-dtype eager PyTorch against the float64 oracle."""
        oracle = self.oracle(case, inputs, torch.float64)
        return {name: t.double() - oracle[name] for name, t in self.eager(case, inputs).items()}

    def assert_parity(self, case: AnyCase, inputs: Any, impl: str, form: str = "dense") -> None:
        """Check all results of one implementation against the oracle, within the budget."""
        actual = self.call(case, inputs, impl, form=form)
        assert actual.keys() == set(case.results), f"{impl}, {case}: got {', '.join(actual)} only"
        self.assert_results(case, inputs, actual, impl)

    def assert_results(self, case: AnyCase, inputs: Any, actual: Results, impl: str) -> None:
        """Check results, as `call` returned them, against the oracle, within the budget.

        Eager's error is the largest of a few draws where a result has few elements: there one
        draw's error may be near zero by luck.
        """
        oracle = self.oracle(case, inputs, torch.float64)
        eager = self.eager(case, inputs)
        draws = [{name: eager[name].double() - oracle[name] for name in oracle}]
        for _ in range(more_draws(oracle.values(), case.between)):
            draws.append(self.eager_errors(case, self.inputs(case)))
        for name, result in actual.items():
            what = f"{name} of {impl}, {case}"
            assert result.dtype == eager[name].dtype, f"{what}: dtype {result.dtype}"
            assert_within_budget(result, oracle[name], [errors[name] for errors in draws], what)

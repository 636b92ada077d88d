"""The gate before any timing: a provider whose results are wrong is reported, not timed.

The oracle is that of the row's `Spec`, the budget that of `lora_kernels.testing`: at most twice the
error of same-dtype eager PyTorch, plus one rounding. Others may err twice as much as ours: who sums
in another order is not wrong. Dropout is left out, since masks differ. y and dx are checked in some
rows, dA and dB, which sum over all rows, as a whole.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from bench.providers.calls import Call, inputs_for
from bench.providers.registry import Provider
from bench.shapes import Case
from lora_kernels.testing import Inputs, assert_within_budget
from lora_kernels.testing.spec import Results

ROWS = 32
OTHERS_MAY = 2.0
# A result of fewer elements may have an eager error near zero by luck: then more draws count.
FEW_ELEMENTS, MORE_DRAWS = 1 << 12, 7
RIGHT, REFUSED, WRONG = "right", "refused", "wrong"


def verdicts(case: Case, providers: Sequence[Provider], device: str) -> dict[str, tuple[str, str]]:
    """Return of each provider whether it may be timed on a case, and why not: state and reason."""
    gate, found = Gate(case, device), {}
    for provider in providers:
        refusal = provider.refuse(case)
        if provider.whole_model:
            refusal = "replaces other parts of a model; see the step suite"
        fault = gate.fault(provider) if refusal is None else None
        if refusal is not None:
            found[provider.name] = REFUSED, refusal
        elif fault is not None:
            found[provider.name] = WRONG, fault
        else:
            found[provider.name] = RIGHT, ""
    return found


class Budget(NamedTuple):
    """What providers of one kind should give, and how far eager PyTorch is from it."""

    oracle: Results
    errors: list[Results]  # of eager PyTorch, one a draw


class Gate:
    """Checks providers on one case's tensors; what they share is computed once."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.inputs = case.inputs(device)
        self._rows = torch.linspace(0, case.m - 1, min(case.m, ROWS)).long()
        self._budgets: dict[tuple[bool, bool], Budget] = {}

    def fault(self, provider: Provider) -> str | None:
        """Return what is wrong with a provider's results, or None."""
        try:
            inputs = inputs_for(provider, self.inputs)
            actual = Call(provider, self.case, inputs, p=0.0).results()
        except Exception as error:  # other packages raise many kinds
            return f"{type(error).__name__}: {error}".splitlines()[0]
        budget, allowed = self._budget(provider), 1.0 if provider.ours else OTHERS_MAY
        if actual.keys() != budget.oracle.keys():
            return f"gives {', '.join(actual)}, expected {', '.join(budget.oracle)}"
        for name, oracle in budget.oracle.items():
            result = actual[name][self._rows] if name in ("y", "dx") else actual[name]
            try:
                errors = [allowed * e[name] for e in budget.errors]
                assert_within_budget(result, oracle, errors, name)
            except AssertionError as error:
                return str(error)
        return None

    def _budget(self, provider: Provider) -> Budget:
        kind = provider.adapters_as_x, provider.adapted
        if kind not in self._budgets:
            oracle, error = self._oracle_and_error(provider, self.inputs)
            errors = [error]
            if min(t.numel() for t in oracle.values()) < FEW_ELEMENTS:
                again = (self.case.inputs(self.device) for _ in range(MORE_DRAWS))
                errors += [self._oracle_and_error(provider, inputs)[1] for inputs in again]
            self._budgets[kind] = Budget(oracle, errors)
        return self._budgets[kind]

    def _oracle_and_error(self, provider: Provider, drawn: Inputs) -> tuple[Results, Results]:
        inputs = inputs_for(provider, drawn)
        oracle = self._expected(provider, inputs, torch.float64)
        eager = self._expected(provider, inputs)
        return oracle, {name: t.double() - oracle[name] for name, t in eager.items()}

    def _expected(
        self, provider: Provider, inputs: Inputs, dtype: torch.dtype | None = None
    ) -> Results:
        """Return the spec's results in `dtype`; None keeps the inputs' dtypes."""
        spec, case = self.case.spec, self.case.parity
        some = replace(inputs, x=inputs.x[self._rows], dy=inputs.dy[self._rows])
        if not provider.adapted:
            case = replace(case, scaling=0.0)
        if self.case.mode == "infer":
            return spec.oracle(case, some, dtype, ("y",))
        found = spec.oracle(case, some, dtype, ("y", "dx"))
        return found | spec.oracle(case, inputs, dtype, ("da", "db")) if provider.adapted else found

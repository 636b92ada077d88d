"""The gate before any timing: a provider whose results are wrong is reported, not timed.

The oracle is the reference in float64, the budget that of `lora_kernels.testing`: at most twice the
error of same-dtype eager PyTorch, plus one rounding. Others may err twice as much as ours: who sums
in another order is not wrong. Dropout is left out, since masks differ. y and dx are checked in some
rows, dA and dB, which sum over all rows, as a whole.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.providers.calls import Call, inputs_for
from bench.providers.registry import Provider
from bench.shapes import SCALING, Case
from lora_kernels.impl.reference import linear as reference
from lora_kernels.operands.call import Adapter, LinearCall, Wanted
from lora_kernels.operands.weight import Dense
from lora_kernels.testing import Inputs, assert_within_budget, make_inputs

ROWS = 32
OTHERS_MAY = 2.0
# A result of fewer elements may have an eager error near zero by luck: then more draws count.
FEW_ELEMENTS, MORE_DRAWS = 1 << 12, 7
RIGHT, REFUSED, WRONG = "right", "refused", "wrong"
Results = dict[str, Tensor]


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
        self.inputs = make_inputs(case.parity, device)
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
                again = (make_inputs(self.case.parity, self.device) for _ in range(MORE_DRAWS))
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
        """Return the reference's results in `dtype`; None keeps the inputs' dtypes."""
        tensors = inputs.x, inputs.dy, inputs.weight, inputs.lora_A, inputs.lora_B
        x, dy, w, a, b = (t if dtype is None else t.to(dtype) for t in tensors)
        scaling = SCALING if provider.adapted else 0.0
        call = LinearCall(Dense(w), Adapter(a, b, scaling), None, None)
        y, _ = reference.forward(x[self._rows], call)
        if self.case.mode == "infer":
            return {"y": y}

        only_dx = Wanted(True, False, False, False)
        dx = reference.backward(dy[self._rows], None, None, call, only_dx).dx
        others = Wanted(False, provider.adapted, provider.adapted, False)
        sums = reference.backward(dy, x, x @ a.to(x.dtype).T, call, others)
        found = {"y": y, "dx": dx, "da": sums.da, "db": sums.db}
        return {name: t for name, t in found.items() if t is not None}

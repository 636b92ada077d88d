"""Inputs, float64 oracle and error budget for parity checks; pytest-free, so benchmarks use it too.

A `Spec` has what is known of an op; the functions here are those of `lora_linear`'s.
"""

from lora_kernels.testing.budget import (
    FEW_ELEMENTS,
    FEW_SUMS,
    MANY_DRAWS,
    MORE_DRAWS,
    assert_within_budget,
    to_tf32,
)
from lora_kernels.testing.dora import DORA, DoraCase, DoraInputs
from lora_kernels.testing.grouped import GROUPED, GroupedCase
from lora_kernels.testing.linear import (
    GRADIENTS,
    LINEAR,
    STORE,
    USUAL,
    Case,
    Inputs,
    Sizes,
    assert_parity,
    assert_results,
    beyond_float16_cases,
    eager_errors,
    eager_results,
    float16_range_cases,
    make_inputs,
    reference_results,
    run,
)
from lora_kernels.testing.mixed import MIXED, MixedCase
from lora_kernels.testing.spec import Spec

# What checks and benchmarks every op.
SPECS = (LINEAR, DORA, GROUPED, MIXED)

__all__ = [
    "DORA",
    "FEW_ELEMENTS",
    "FEW_SUMS",
    "GRADIENTS",
    "GROUPED",
    "LINEAR",
    "MANY_DRAWS",
    "MIXED",
    "MORE_DRAWS",
    "SPECS",
    "STORE",
    "USUAL",
    "Case",
    "DoraCase",
    "DoraInputs",
    "GroupedCase",
    "Inputs",
    "MixedCase",
    "Sizes",
    "Spec",
    "assert_parity",
    "assert_results",
    "assert_within_budget",
    "beyond_float16_cases",
    "eager_errors",
    "eager_results",
    "float16_range_cases",
    "make_inputs",
    "reference_results",
    "run",
    "to_tf32",
]

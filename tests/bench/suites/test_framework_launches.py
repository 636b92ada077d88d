"""What frameworks would launch, counted as the formulas count it."""

import math
from dataclasses import replace

import pytest

from bench import shapes
from bench.suites import framework_launches
from lora_kernels.impl.triton.plan.config import Problem
from tests.support.bench import SMALL


@pytest.mark.parametrize("dropout", [False, True])
def test_eager_launches_multiply_what_the_formulas_ask(dropout):
    m, n, k, r = 96, 64, 128, 16

    def flops(steps_of):
        both = [steps_of(Problem(m, n, k, r, 16, dropout, True, way)) for way in (False, True)]
        products = [s for steps in both for s in steps if isinstance(s, framework_launches.Product)]
        return sum(2 * math.prod(product[:3]) for product in products)

    assert flops(framework_launches.peft) == shapes.flops(SMALL)
    assert flops(framework_launches.plain) == shapes.flops(replace(SMALL, r=0))
    again = 2 * m * k * r  # the addmm order computes x Aᵀ a second time
    assert flops(framework_launches.addmm) == shapes.flops(SMALL) + again

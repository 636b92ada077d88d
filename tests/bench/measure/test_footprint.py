"""What is counted beside time."""

from dataclasses import replace

import pytest

from bench.measure.footprint import footprint
from lora_kernels import native
from tests.support.bench import SMALL


@pytest.mark.skipif(native.absence("cpu") is not None, reason="the compiled part is not built")
def test_footprint_counts_what_is_saved_and_launched():
    case = replace(SMALL, m=512, n=256, k=256)
    x_bytes = 4 * case.m * case.k
    base, peft, ours = (footprint(case, name, "cpu") for name in ("base", "peft", "cpu"))
    assert base.launches == 2  # x Wᵀ, dy W
    assert base.saved_bytes == 0
    assert peft.saved_bytes >= x_bytes  # the dropped x, or its mask
    assert ours.saved_bytes <= 0.1 * x_bytes  # D(x) Aᵀ and the seed: R / K of x
    assert ours.launches < peft.launches

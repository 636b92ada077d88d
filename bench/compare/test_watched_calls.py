"""The watched calls for pytest-benchmark: `pytest bench --benchmark-only`."""

from itertools import product
from typing import Any

import pytest

from bench.compare.watched_calls import CASES, NAMES, AbsentError, call_of
from bench.measure.timing import threads


@pytest.mark.parametrize(("case", "name"), list(product(CASES, NAMES)))
def test_call(benchmark: Any, case: str, name: str) -> None:
    """Time one call after the gate, by one thread, whose CPU time is the clock."""
    with threads(1):
        try:
            call = call_of(case, name)
        except AbsentError as error:
            pytest.skip(str(error))
        benchmark(call)

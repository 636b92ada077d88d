"""DoRA, embeddings and convolutions beside PEFT's: the same results, and every case is made."""

from dataclasses import replace

import pytest

pytest.importorskip("peft")

from bench.measure.beside_peft import FROZEN, OURS, PEFT, farthest
from bench.providers.kinds import LABELS, Call
from bench.suites.layers_of_kinds import SUITE
from tests.support.bench import Here

SMALL = [replace(case, m=3, n=12, k=24, size=5, r=4, limit=0.5) for case, *_ in SUITE.limits]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_ours_computes_what_peft_does(case):
    expected = Call(case, PEFT).results()
    assert len(expected) == {"dora": 5, "embedding": 3, "conv": 4}[case.kind]
    assert farthest(Call(case, OURS).results(), expected) < 1e-4
    assert len(Call(case, FROZEN).results()) == 2 - (case.kind == "embedding")


def test_a_line_for_each_provider():
    lines = list(SUITE.measure(SMALL[1], 0.01, Here()))
    assert [line.strip().partition("  ")[0] for line in lines] == list(LABELS.values())
    assert "<=0.50" in lines[-1]

"""A run that shows nothing says so."""

from types import SimpleNamespace

from bench.measure.correctness import WRONG
from bench.measure.timing import TIMED
from bench.report import summary


def _row(**fields):
    return SimpleNamespace(provider="cpu", case=None, reason="", state=TIMED, **fields)


def test_a_benchmark_that_measured_nothing_complains():
    assert summary.complaint({}) == "nothing was measured"
    assert summary.complaint({"layer": []}) == "nothing was measured"
    good = _row()
    assert summary.complaint({"layer": [good]}) is None
    wrong = SimpleNamespace(**{**vars(good), "reason": "y is off", "state": WRONG})
    assert summary.complaint({"layer": [wrong]}) == "nothing was measured"
    assert "y is off" in summary.complaint({"layer": [good, wrong]})
    theirs = SimpleNamespace(**{**vars(wrong), "provider": "addmm"})
    assert summary.complaint({"layer": [good, theirs]}) is None

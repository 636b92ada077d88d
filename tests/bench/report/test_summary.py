"""A run that shows nothing says so."""

from dataclasses import replace
from types import SimpleNamespace

from bench.measure.correctness import WRONG
from bench.measure.environment import describe_run
from bench.measure.timing import TIMED, Spread
from bench.report import docs_tables, figures, summary, tables
from bench.suites import step


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


def test_steps_over_quantised_weights_are_told_from_dense_ones():
    (quantised,) = step.qlora_cases(step.SMALLEST, ["bf16"], [0.0])
    cases = quantised, replace(quantised, base="dense")
    one = Spread.of([1.0, 1.0, 1.0])
    rows = [
        step.StepRow(case, name, TIMED, ms=one, over_peft=one, over_base=one, peak_bytes=1)
        for case in cases
        for name in ("peft", "cpu")
    ]
    assert len({tables.case_of(row) for row in rows}) == 2
    assert len({figures._step_group(row) for row in rows}) == 2
    assert len({short.what for short in summary.in_short({"step": rows})}) == 2
    page = list(docs_tables.block({"run": describe_run("cpu"), "rows": {"step": rows}}, "file"))
    assert sum("p = 0" in line for line in page) == 1, "the table has no column for it"

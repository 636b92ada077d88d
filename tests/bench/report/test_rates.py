"""The table of rates, renewed from a file of results; the picker follows, or nothing changes."""

import json
import math
from dataclasses import replace

import pytest

from bench.providers.registry import FLOOR, LIBRARY, ONE_LAUNCH
from bench.report import rates as report
from bench.report.rates import Sample
from lora_kernels.impl.triton.plan import rates
from lora_kernels.impl.triton.plan.config import LibraryConfig, Problem
from lora_kernels.impl.triton.plan.device import known
from lora_kernels.impl.triton.plan.plan import plan
from lora_kernels.impl.triton.plan.rates import Rates
from tests.support.paths import ROOT

GPU = "NVIDIA H100 80GB HBM3"
SIZES = [(m, n, 4096) for m in (16, 2048, 8192) for n in (1024, 4096)]
ABOUT = {
    "run": {
        "machine": {"gpu": GPU}, "versions": {"torch": "2.13", "triton": "3.8"},
        "date": "2026-11-30T10:00:00",
    },
}  # fmt: skip


def _row(provider, size, seconds, **changed):
    case = dict(zip("mnk", size, strict=True)) | {"r": 16, "dtype": "bf16", "p": 0.0}
    return {
        "case": {**case, "mode": "infer", **changed}, "provider": provider, "state": "timed",
        "ms": {"median": 1e3 * seconds},
    }  # fmt: skip


def _file(tmp_path, rows, **about):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**ABOUT, **about, "rows": {"layer": rows}}))
    return path


def _rows(factor, reached):
    """Return the times of a GPU with other rates, one launch's times a factor besides."""
    device = known(GPU)
    by = replace(device, reached=reached)
    return [
        _row(name, size, sample.predicted(by, device) * (factor if name == ONE_LAUNCH else 1))
        for size in SIZES
        for name in (FLOOR, LIBRARY, ONE_LAUNCH)
        for sample in [Sample(name, (Problem(*size, 16, 16),), 0.0)]
    ]


def _table(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(report.PATH.read_text())
    return path


def _library_by(table, size):
    entries = rates.entries(rates.read(table.read_text()), GPU, (9, 0))
    device = replace(known(GPU), reached=Rates(**{k: rate.value for k, rate in entries.items()}))
    return isinstance(plan(Problem(*size, 16, 16), device).config, LibraryConfig)


@pytest.mark.parametrize(("factor", "library"), [(3.0, True), (0.75, False)])
def test_the_picker_follows_what_was_measured(factor, library, tmp_path, capsys):
    table, size = _table(tmp_path), (8192, 1024 if library else 4096, 4096)
    assert _library_by(table, size) != library
    path = _file(tmp_path, _rows(factor, known(GPU).rates))
    before = table.read_text()
    assert report.main([str(path), "--table", str(table)]) == 0
    assert table.read_text() == before  # shown alone
    assert report.main([str(path), "--table", str(table), "--write", "--gpu", GPU]) == 0
    assert _library_by(table, size) == library
    words = {True: "library", False: "one launch"}
    choice = f"{'x'.join(map(str, size))} forward: {words[not library]} -> {words[library]}"
    assert choice in capsys.readouterr().out
    after = rates.read(table.read_text())
    assert {rate.mark for rate in after["gpus"][GPU].values()} == {rates.MEASURED}
    assert all("results.json, 2026-11-30" in r.source for r in after["gpus"][GPU].values())
    del after["gpus"][GPU]
    assert after == rates.read(before)


def test_rates_that_made_the_times_are_found(tmp_path):
    true = known(GPU).rates._replace(
        gemm=0.8, streaming=0.5, latency_seconds=9e-6, tiles=0.6, launch_seconds=2e-5
    )
    found = report.fitted(report.measured(_file(tmp_path, _rows(1.0, true))))
    for name, rate in found.items():
        assert math.isclose(rate, getattr(true, name), rel_tol=0.05), name


def test_times_of_both_directions_together_decide_no_seconds(tmp_path):
    rows = _rows(1.0, known(GPU).rates)
    for row in rows:
        row["case"]["mode"] = "train"
        row["ms"]["median"] *= 3
    found = report.fitted(report.measured(_file(tmp_path, rows)))
    assert found.keys() == set(report.SHARES)


def test_what_was_not_measured_stays(tmp_path):
    rows = [row for row in _rows(2.0, known(GPU).rates) if row["provider"] == ONE_LAUNCH]
    found = report.fitted(report.measured(_file(tmp_path, rows)))
    assert found.keys() == {"tiles", "launch_seconds"}


def test_the_tables_figures_of_the_h200_are_those_of_its_file():
    found = report.measured(ROOT / "bench" / "results" / "2026-11-29-h200-plans.json")
    shipped = rates.shipped()
    generation = {**shipped["any"][""], **shipped["generations"]["9.0"]}
    reached = Rates(**{name: rate.value for name, rate in generation.items()})
    new = report.fitted(found._replace(device=replace(found.device, reached=reached)))
    entries = shipped["gpus"][found.device.name]
    assert new == {name: rate.value for name, rate in entries.items()}
    assert {rate.source for rate in entries.values()} == {found.source}


GOOD = _row(FLOOR, SIZES[0], 1e-5)
CPU = {
    "run": {**ABOUT["run"], "machine": {"cpu": "an EPYC", "isa": "AVX2", "cores": 2, "threads": 1}}
}
T4 = {"run": {**ABOUT["run"], "machine": {"gpu": "Tesla T4"}}}
BROKEN = {
    "no results": (3, {}, "expected results of"),
    "no run": ([GOOD], {"run": {}}, "expected results of the layer suite, got KeyError"),
    "a CPU's": ([GOOD], CPU, "expected times of a GPU, got those of an EPYC"),
    "another GPU's": ([GOOD], T4, "expected a GPU of plan/device.py, got 'Tesla T4'"),
    "no rows": ([], {}, "expected timed rows of base, library, one-launch in 16 bits, got none"),
    "float32": ([_row(FLOOR, SIZES[0], 1e-5, dtype="fp32")], {}, "expected timed rows"),
    "not timed": ([{**GOOD, "state": "wrong"}], {}, "expected timed rows"),
    "PEFT alone": ([{**GOOD, "provider": "peft"}], {}, "expected timed rows"),
    "one side": ([GOOD], {}, "expected those of base and library"),
    "no number": ([_row(FLOOR, SIZES[0], math.nan)], {}, "expected positive times"),
    "a negative time": ([_row(FLOOR, SIZES[0], -1e-5)], {}, "expected positive times"),
    "seconds for ms": (_rows(1e-3, known(GPU).rates), {}, "tiles: expected 0.02 to 1.2"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_changes_nothing(what, tmp_path, capsys):
    rows, about, message = BROKEN[what]
    table = _table(tmp_path)
    path = _file(tmp_path, rows, **about)
    assert report.main([str(path), "--write", "--table", str(table)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out
    assert table.read_text() == report.PATH.read_text()


def test_another_gpu_than_the_named_one_is_refused(tmp_path, capsys):
    table, path = _table(tmp_path), _file(tmp_path, _rows(1.0, known(GPU).rates))
    for named in ("NVIDIA H200", "H100"):
        assert report.main([str(path), "--write", "--table", str(table), "--gpu", named]) == 2
        assert f"expected times of {named}, got {GPU}'s" in capsys.readouterr().err
    assert report.main([str(tmp_path / "none.json"), "--write", "--table", str(table)]) == 2
    assert table.read_text() == report.PATH.read_text()

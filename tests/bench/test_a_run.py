"""A small run of the program: its file, its page, and how far it agrees with another."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

import bench.__main__ as program
from bench.compare import runs
from bench.measure import results_file, timing
from bench.measure.results_file import FILE, Results
from bench.measure.timing import Spread
from bench.providers.registry import PROVIDERS
from bench.report import page
from tests.support.paths import ROOT


@dataclass(frozen=True)
class _Row:
    """A row of a suite that there is not."""

    provider: str
    ms: Spread


def _session():
    return SimpleNamespace(probe=SimpleNamespace(close=lambda: None))


def test_interruption_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    def measured(session):
        yield _Row("cpu", Spread(1.0, 1.0, 1.0))

    def interrupted(session):
        yield _Row("peft", Spread(2.0, 2.0, 2.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "write", lambda path, folder: folder / page.PAGE)
    points = [program.Point("layer", str(f), "", f) for f in (measured, interrupted, measured)]
    kept = results_file.Results(tmp_path / results_file.FILE, {})
    assert program.measure(points, _session(), kept) == program.INTERRUPTED
    data = results_file.load(kept.path)
    assert [row.provider for row in data["rows"]["layer"]] == ["cpu", "peft"]
    assert data["interrupted"]
    assert "2 rows kept" in capsys.readouterr().err


def test_the_benchmark_program_fails_where_nothing_ran(monkeypatch, capsys, tmp_path):
    absent = next(p.name for p in PROVIDERS if p.absence("cpu"))
    assert program.main(["--providers", f"eager,{absent}", "--list"]) == 2
    assert f"--providers: {absent}: " in capsys.readouterr().err
    monkeypatch.setattr(program, "points", lambda options: iter(()))
    assert program.main(["--list"]) == 2
    assert "nothing to measure" in capsys.readouterr().err
    monkeypatch.setattr(program.page, "write", lambda path, folder: folder)
    session = SimpleNamespace(probe=SimpleNamespace(close=lambda: None))
    points = [program.Point("layer", "title", "", lambda session: [])]
    assert program.measure(points, session, Results(tmp_path / FILE, {})) == 1
    assert "nothing was measured" in capsys.readouterr().err


def test_files_without_common_ratios_do_not_agree(tmp_path, capsys):
    for name in ("first", "second"):
        Results(tmp_path / f"{name}.json", {})
    assert runs.main([str(tmp_path / "first.json"), str(tmp_path / "second.json")]) == 2
    assert "no ratio is quiet in both files" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small run of the program."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "bench", "--quick", "--seconds", "0.02", "--out", str(folder)]
    asked = ["--suite", "layer,memory", "--shapes", "minilm/up", "--tokens", "64"]
    done = subprocess.run(
        [*command, *asked, "--providers", "addmm,cpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_page_holds_everything_itself(run):
    text = (run / page.PAGE).read_text()
    data = results_file.load(run / results_file.FILE)
    sources = re.findall(r'<img src="([^"]*)"', text)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<(script|link)|https?://|url\(", text)
    assert len(sources) == len(list(run.glob("*.png")))
    rows = sum(len([r for r in rows if not r.reason]) for rows in data["rows"].values())
    assert text.count("<tr><td") >= rows
    assert data["run"]["revision"] in text


def test_rows_carry_what_the_suite_promises(run):
    data = results_file.load(run / results_file.FILE)
    timed = [row for row in data["rows"]["layer"] if row.state == "timed"]
    assert {row.provider for row in timed} >= {"base", "peft", "addmm"}
    for row in timed:
        assert row.rounds >= timing.MIN_ROUNDS
        assert row.ms.low <= row.ms.median <= row.ms.high
        assert row.flops > 0
        assert row.floor_bytes > 0
        assert row.roofline > 0
        assert row.footprint.launches > 0
        assert row.footprint.peak_bytes > 0
    assert data["ceilings"]["bytes_per_second"] > 0
    assert all(rate > 0 for rate in data["ceilings"]["flops_per_second"].values())


def _changed(source, target, change):
    """Write a run of its layers compared with PEFT alone, changed: others may be quiet, too."""
    data = json.loads(source.read_text())
    rows = [row for row in data["rows"]["layer"] if row["over_peft"] is not None]
    assert rows
    for row in rows:
        change(row)
    target.write_text(json.dumps(data | {"rows": {"layer": rows}}))
    return str(target)


def test_runs_agree_where_quiet_ratios_do(run, tmp_path, capsys):
    def quiet(row):
        row["over_peft"] = {"median": 0.5, "low": 0.495, "high": 0.505}
        row["over_base"] = None

    def apart(row):
        row["over_peft"], row["over_base"] = {"median": 0.6, "low": 0.595, "high": 0.605}, None

    def apart_and_loud(row):
        row["over_peft"], row["over_base"] = {"median": 0.6, "low": 0.5, "high": 0.7}, None

    def apart_and_slower(row):
        apart(row)
        row["ms"]["median"] *= 1.2

    first = _changed(run / results_file.FILE, tmp_path / "first.json", quiet)
    nothing = 2  # is quiet in both
    changes = (
        (quiet, 0),
        (apart, runs.FAILED),
        (apart_and_loud, nothing),
        (apart_and_slower, nothing),
    )
    for change, status in changes:
        second = _changed(run / results_file.FILE, tmp_path / "second.json", change)
        assert runs.main([first, second]) == status
        assert ("0.500, then 0.600" in capsys.readouterr().out) == (status == runs.FAILED)

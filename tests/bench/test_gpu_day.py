"""The steps of bench/gpu_day.sh, with an interpreter that only notes what it is asked."""

import os
import re
import subprocess

import pytest

from bench.options import parse
from bench.shapes import cases
from tests.support.paths import ROOT


def _gpu_day(folder, *options, status, **environment):
    """Run the script with an interpreter that notes its arguments and leaves with a status.

    status: the number, or what the interpreter does instead.
    """
    python = folder / "python"
    ending = f"exit {status}" if isinstance(status, int) else status
    python.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{ending}\n')
    python.chmod(0o755)
    return subprocess.run(
        [ROOT / "bench" / "gpu_day.sh", *(options or ["--dry-run"]), folder / "day"],
        env={**os.environ, "PYTHON": str(python), **environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("status", [0, 3])
def test_gpu_day_goes_through_its_steps(tmp_path, status):
    done = _gpu_day(tmp_path, status=status)
    assert done.returncode == bool(status), done.stderr
    named = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert named == [
        "requirements", "build", "info", "parts", "parity-triton", "parity-cuda", "parity", "tune",
        "plans", "rates", "layer", "step", "call-forward", "call-backward", "results",
    ]  # fmt: skip
    budgets = re.findall(r"(?:would run within| s of) (\d+)", done.stdout)
    assert len(budgets) == 14
    assert sum(map(int, budgets)) <= 24 * 60
    assert len((tmp_path / "calls").read_text().splitlines()) == 7
    assert done.stdout.count(f"status {status}") == 7


def test_gpu_day_cuts_off_what_hangs_and_goes_on(tmp_path):
    """Each step has its share of the time, whatever the others take."""
    done = _gpu_day(tmp_path, status="exec sleep 60", LIMIT="12")
    assert done.returncode == 1
    assert done.stdout.count("status 124") == 7
    assert "no time left" not in done.stdout


def test_gpu_day_goes_on_after_a_crash(tmp_path):
    done = _gpu_day(tmp_path, status="kill -SEGV $$")
    assert done.returncode == 1
    assert done.stdout.count("status 139") == 7


def test_gpu_day_asks_for_code_of_the_gpu_at_hand(tmp_path):
    """And for each implementation's parity in a process of its own; here nothing is run."""
    python = 'case "$1" in -c) echo 9.0a;; esac; echo "arch $TORCH_CUDA_ARCH_LIST"'
    done = _gpu_day(tmp_path, "--", status=python)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "arch 9.0a" in (tmp_path / "day" / "build.log").read_text()
    calls = (tmp_path / "calls").read_text().splitlines()
    suites = [call for call in calls if "-m pytest" in call and "--collect-only" not in call]
    assert [("triton" in call, "cuda" in call) for call in suites] == [
        (True, False), (False, True), (False, False),
    ]  # fmt: skip
    assert all("-k gpu" in call for call in suites)


def test_gpu_day_measures_what_decides(tmp_path):
    """Twelve shapes, by those whose times the table of rates is made from, then that table."""
    assert _gpu_day(tmp_path, "--", status="echo 9.0").returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    (tune,) = (call for call in calls if "lora_kernels tune" in call)
    (plans,) = (call for call in calls if "--shapes plans" in call)
    (table,) = (call for call in calls if "bench.report.rates" in call)
    options = parse(plans.replace("--device cuda", "--device cpu").split()[2:])
    measured = {(case.m, case.n, case.k, case.r) for case in cases(options.shapes, options.grid)}
    assert len(measured) == 12
    tuned = re.findall(r"\d+x\d+x\d+x\d+", tune)
    assert {tuple(map(int, shape.split("x"))) for shape in tuned} == measured
    assert {"peft", "addmm", "library", "one-launch", "cuda"} <= set(options.providers)
    assert options.grid.calls == [("train", 0.1), ("train", 0.0), ("infer", 0.0)]
    assert "overhead" in options.suites  # host time
    assert table.split()[-1] == f"{options.out}/results.json"


def test_gpu_day_leaves_out_what_it_is_told_to(tmp_path):
    done = _gpu_day(tmp_path, "--", status=0, SKIP="build step")
    assert done.returncode == 0
    left_out = re.findall(r"(\S+): left out", (tmp_path / "day" / "steps.txt").read_text())
    assert left_out == ["build", "step"]
    assert "pip install -v" not in (tmp_path / "calls").read_text()


def test_gpu_day_starts_nothing_when_its_time_is_over(tmp_path):
    assert _gpu_day(tmp_path, status=0, LIMIT="0").returncode == 1
    assert not (tmp_path / "calls").exists()
    assert "no time left" in (tmp_path / "day" / "steps.txt").read_text()


def test_gpu_day_needs_a_gpu(tmp_path):
    done = _gpu_day(tmp_path, "--", status=1)
    assert done.returncode == 2
    assert "needs a CUDA GPU" in done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert "unknown option --dry" in _gpu_day(tmp_path, "--dry", status=1).stderr

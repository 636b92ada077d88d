"""The steps of bench/gpu_day.sh, with an interpreter that only notes what it is asked."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _gpu_day(folder, *options, status, **environment):
    """Run the script with an interpreter that notes its arguments and leaves with a status."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\nexit {status}\n')
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
        "requirements", "build", "info", "parts", "parity", "tune", "layer", "step",
        "call-forward", "call-backward", "results",
    ]  # fmt: skip
    assert len((tmp_path / "calls").read_text().splitlines()) == 7
    assert done.stdout.count(f"status {status}") == 7


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

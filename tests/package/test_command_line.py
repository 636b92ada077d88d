"""`python -m lora_kernels`: what it answers, in one line where something is missing."""

import io
import json
import os
import re
import subprocess
import sys

import pytest

import lora_kernels
from lora_kernels import _progress
from lora_kernels.__main__ import main
from lora_kernels._progress import Progress
from lora_kernels.dispatch import IMPLEMENTATIONS
from lora_kernels.impl.triton import support
from lora_kernels.impl.triton.plan import tuned
from lora_kernels.impl.triton.plan.device import known
from tests.support.paths import ROOT


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    support._has_triton.cache_clear()
    yield
    monkeypatch.undo()
    support._has_triton.cache_clear()


def test_info_names_versions_and_implementations():
    done = subprocess.run(
        [sys.executable, "-m", "lora_kernels", "info"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    assert not done.stderr.strip() or "Traceback" not in done.stderr
    assert re.search(r"^torch +\d", done.stdout, re.MULTILINE)
    assert re.search(r"^cpu +eager +usable", done.stdout, re.MULTILINE)


def test_info_as_json_says_what_the_text_says(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["lora_kernels"] == lora_kernels.__version__
    assert found["implementations"]["cpu"].keys() == {each.name for each in IMPLEMENTATIONS}
    assert found["implementations"]["cpu"]["eager"] is None
    for name, version in found["versions"].items():
        assert re.search(rf"^{name} +{re.escape(version or 'not installed')}", text, re.MULTILINE)
    for reason in (*found["parts"].values(), *found["implementations"]["cpu"].values()):
        assert reason is None or reason in text


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lora_kernels {lora_kernels.__version__}\n"


def test_without_a_command_it_says_which_there_are(capsys):
    assert main([]) == 0
    printed = capsys.readouterr()
    assert not printed.err
    for command in ("info", "inspect", "tune", "--version"):
        assert command in printed.out


@pytest.mark.parametrize("command", [["nonsense"], ["inspect", "--rank", "0"]], ids=str)
def test_what_it_has_not_is_a_usage_error(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command)
    printed = capsys.readouterr().err
    assert "usage" in printed
    assert "_positive" not in printed


@pytest.mark.parametrize(
    "command", [["inspect"], ["tune", "--shapes", "8x8x8x8"], ["tune", "--shapes", "foo"]], ids=str
)
def test_without_triton_one_line_says_so(command, without_triton, capsys):
    assert main(command) == 2
    assert capsys.readouterr().err == "triton is not installed: pip install triton\n"


@pytest.mark.parametrize("absent", [None, "not built"])
def test_the_built_part_is_read_by_tritons_program(absent, without_triton, monkeypatch, capsys):
    from lora_kernels import __main__
    from lora_kernels.impl.cuda.tools import inspect

    for module in (__main__, inspect):
        monkeypatch.setattr(module, "absence", lambda part: absent)
    assert main(["inspect", "--built"]) in (1, 2)
    printed = capsys.readouterr()
    if absent:
        assert printed.out == "compiled CUDA part: not built\n"
    else:
        assert printed.err == f"{support.NO_TRITON}: pip install triton\n"


def test_a_finder_may_refuse_triton(monkeypatch):
    def refuse(name):
        raise ImportError(f"{name} is forbidden here")

    monkeypatch.setattr(support, "find_spec", refuse)
    assert support._has_triton.__wrapped__() is False


def test_a_triton_that_is_too_old_or_interprets(monkeypatch, capsys):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert main(["inspect"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert main(["inspect"]) == 2
    assert capsys.readouterr().err == (
        "needs triton 3.6 or newer, got 3.5.1: pip install --upgrade triton\n"
    )


def count_three(monkeypatch, stderr):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", stderr)
    with Progress(3, "configuration") as progress:
        for number in range(3):
            progress.say(f"row {number}")
            progress.advance()
    return out.getvalue(), stderr.getvalue()


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    pytest.importorskip("tqdm")
    rows, bar = count_three(monkeypatch, Terminal())
    assert rows == "row 0\nrow 1\nrow 2\n"
    assert "3/3" in bar


@pytest.mark.parametrize("absent", [False, True], ids=["no terminal", "no tqdm"])
def test_progress_is_silent_elsewhere(absent, monkeypatch):
    if absent:
        monkeypatch.setattr(_progress, "find_spec", lambda name: None)
    stderr = Terminal() if absent else io.StringIO()
    assert count_three(monkeypatch, stderr) == ("row 0\nrow 1\nrow 2\n", "")


def test_a_failure_closes_the_bar(monkeypatch):
    closed = []
    progress = Progress(2, "configuration")
    monkeypatch.setattr(progress, "_bar", type("Bar", (), {"close": lambda _: closed.append(1)})())
    with pytest.raises(KeyboardInterrupt), progress:
        raise KeyboardInterrupt
    assert closed


@pytest.mark.parametrize("named", [False, True])
def test_tuned_plans_are_where_caches_are(named, monkeypatch, tmp_path):
    pytest.importorskip("platformdirs")
    monkeypatch.delenv(tuned.ENVIRONMENT)
    if named:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
    cache = tmp_path if named else tmp_path / ".cache"
    found = tuned.path_of(known("NVIDIA H200"))
    if sys.platform == "linux":
        assert found.parent == cache / "lora_kernels" / "tuned"
    assert not os.listdir(tmp_path)  # asking makes nothing

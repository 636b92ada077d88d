"""Runners of suites, and tools, end with a failure where nothing ran."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, namedtuple
from importlib import metadata
from types import SimpleNamespace

import pytest

from tests import conftest
from tests.support.paths import ROOT

DESELECT = """
def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if "lora" in item.name]
def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line("3 layers patched, 2 calls fused")
"""
GOOD = "import os\ndef test_lora_one(): pass\ndef test_lora_two(): pass\ndef test_other(): pass\n"
OF_GOOD = {"tests": 2, "passed unpatched": 2, "layers patched": 3, "calls fused": 1}
WORSE = GOOD + "def test_lora_three(): assert os.environ['LORA_KERNELS_PATCH'] == '0'\n"


def _script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """PEFT's runner on a suite of one file: functions that run it and write its baseline."""
    runner = _script(ROOT / "tests" / "peft_suite" / "run.py")
    (tmp_path / "hubless.py").write_text(DESELECT)
    (tmp_path / "src" / "peft").mkdir(parents=True)
    version = metadata.version("peft")
    (tmp_path / "src" / "peft" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    (tmp_path / "tests").mkdir()
    baseline = tmp_path / "baseline.json"
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # for speed
    monkeypatch.setattr(runner, "HERE", tmp_path)
    monkeypatch.setattr(runner, "BASELINE", baseline)

    def expect(counted):
        files = {"test_a": counted} if counted else {}
        baseline.write_text(json.dumps({"peft": version, "excused": {}, "files": files}))

    expect(None)

    def run(text, *options):
        if text is not None:
            (tmp_path / "tests" / "test_a.py").write_text(text)
        return runner.main([str(tmp_path), "test_a.py", *options])

    return SimpleNamespace(run=run, expect=expect, baseline=baseline)


def test_peft_suite_is_green_where_as_much_ran(suite):
    assert suite.run(GOOD, "--write-baseline") == 0
    assert json.loads(suite.baseline.read_text())["files"] == {"test_a": OF_GOOD}
    assert suite.run(GOOD) == 0
    assert suite.run("from tests import test_a\n" + GOOD) == 0


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        (None, "unpatched: no such file"),
        ("import nonsuch\n" + GOOD, "unpatched: a file can't be collected"),
        ("def test_other(): pass\n", "unpatched: no test of LoRA in it"),
        ("", "unpatched: no test of LoRA in it"),
        (GOOD.replace("test_lora_two", "two"), "tests: expected at least 2, got 1"),
        (GOOD + "import pytest; pytestmark = pytest.mark.skip\n", "passed unpatched: expected"),
        ("import os\nos._exit(9)\n", "unpatched: pytest ended with 9"),
        ("import os\nif os.environ['LORA_KERNELS_PATCH'] == '1': x\n" + GOOD, "patched: a file"),
        (WORSE, "Passed unpatched and not patched: 1"),
    ],
)  # fmt: skip
def test_peft_suite_is_red_where_less_ran(suite, text, printed, capsys):
    suite.expect(OF_GOOD)
    assert suite.run(text) == 1
    assert printed in capsys.readouterr().out


def test_peft_suite_is_red_where_nothing_was_patched(suite, capsys):
    suite.expect(OF_GOOD)
    plugin = suite.baseline.with_name("hubless.py")
    plugin.write_text(DESELECT.replace("3 layers patched, 2", "0 layers patched, 0"))
    assert suite.run(GOOD) == 1
    assert "calls fused: expected at least 1, got 0" in capsys.readouterr().out


def test_peft_suite_is_red_without_a_baseline(suite, capsys):
    assert suite.run(GOOD) == 1
    assert "test_a: not in baseline.json" in capsys.readouterr().out
    suite.baseline.write_text('{"peft": "0.1", "excused": {}, "files": {}}')
    assert suite.run(GOOD) == 2
    (suite.baseline.parent / "src" / "peft" / "__init__.py").write_text('__version__ = "0.1"')
    with pytest.raises(SystemExit):
        suite.run(GOOD)
    assert "which is installed, got 0.1" in capsys.readouterr().err


def test_peft_suite_excuses_by_name(suite, capsys):
    suite.run(WORSE, "--write-baseline")
    baseline = json.loads(suite.baseline.read_text())
    baseline["excused"] = {"tests.test_a::test_lora_three": "its reason"}
    suite.baseline.write_text(json.dumps(baseline))
    capsys.readouterr()
    suite.run(WORSE, "--write-baseline")
    assert suite.run(WORSE) == 0
    assert "excused: tests.test_a::test_lora_three: its reason" in capsys.readouterr().out
    assert suite.run(GOOD) == 1  # a test that is excused has to be there all the same


@pytest.mark.slow
@pytest.mark.parametrize("needs", ["cpu", "nonsense"])
def test_a_run_of_tests_that_needs_what_is_absent_fails(needs, tmp_path):
    """Such tests skip, and a run of skipped tests is green."""
    package = tmp_path / "lora_kernels"
    shutil.copytree(ROOT / "lora_kernels", package, ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("stacks"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "LORA_KERNELS_TEST_NEEDS": needs}
    environment.pop("LORA_KERNELS_TEST_LIBRARY", None)
    command = [sys.executable, "-m", "pytest", "-q", "tests/impl/cpu/test_cpu.py"]

    def run():
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = run()
    assert done.returncode == 4
    assert f"LORA_KERNELS_TEST_NEEDS: {'expected' if needs != 'cpu' else 'cpu: '}" in done.stderr
    environment["LORA_KERNELS_TEST_NEEDS"] = ""
    assert run().returncode == 0
    environment["LORA_KERNELS_TEST_LIBRARY"] = str(tmp_path / "nonsuch.so")
    assert run().returncode == 4


def test_of_many_cases_some_run_and_never_none():
    def cases(name, count, *marks):
        return [Item(f"t.py::{name}[{i}]", marks) for i in range(count)]

    Item = namedtuple("Item", "nodeid keywords")
    items = [*cases("few", 3, "many"), *cases("many", 60, "many"), *cases("unmarked", 60)]
    items.append(Item("t.py::single", ("many",)))
    dropped = conftest._beyond_one_in(3, items)
    assert dropped == conftest._beyond_one_in(3, items), "processes that share the tests differ"
    kept = [item for item in items if item not in dropped]
    names = Counter(item.nodeid.partition("[")[0] for item in kept)
    assert [*names.values()] == [1, 20, 60, 1]


def test_of_slow_tests_a_sixth_run():
    Item = namedtuple("Item", "nodeid keywords")
    items = [Item(f"t.py::test_{t}[{i}]", ("slow",)) for t in range(12) for i in range(4)]
    items.append(Item("t.py::quick", ()))
    dropped = conftest._beyond_one_in(2, items)
    kept = Counter(i.nodeid.partition("[")[0] for i in items if i not in dropped)
    assert sorted(kept.values()) == [1, 4, 4]
    assert "t.py::quick" in kept


def test_triton_tools_fail_where_nothing_is_compiled(monkeypatch, capsys, tmp_path):
    pytest.importorskip("triton")
    from lora_kernels.impl.triton.tools import inspect, spill_free

    assert inspect.main([80], [16], "no such configuration", None, None) == 1
    assert "0 kernels" in capsys.readouterr().out
    table = tmp_path / "table.csv"
    monkeypatch.setattr(spill_free, "TABLE", table)
    monkeypatch.setattr(sys, "argv", ["spill_free.py", "--only", "no such row"])
    with pytest.raises(SystemExit, match="2"):
        spill_free.main()

    def refused(job):
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(spill_free, "inspect_job", refused)
    assert spill_free.spill_free_ranks(list(spill_free.jobs())[:1]) == ([], False)
    monkeypatch.setattr(spill_free, "ProcessPoolExecutor", _InThisProcess)
    monkeypatch.setattr(sys, "argv", ["spill_free.py"])
    with pytest.raises(SystemExit, match="nothing could be compiled"):
        spill_free.main()
    assert not table.exists()


class _InThisProcess:
    def __init__(self, *given):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    map = staticmethod(map)


def test_cuda_inspect_has_a_column_for_faults(monkeypatch, capsys):
    from lora_kernels.impl.cuda.tools import inspect

    report = inspect.Report("sm_80", "lora_forward_bf16", 255, 8, "64 HMMA")
    monkeypatch.setattr(inspect, "absence", lambda part: None)
    monkeypatch.setattr(inspect, "reports", lambda library: [report])
    assert inspect.main(None) == 1
    *table, _ = capsys.readouterr().out.splitlines()
    head, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert dict(zip(head, row, strict=True))["faults"] == "spills 8 bytes"


def test_cuda_inspect_fails_where_it_reads_no_kernel(monkeypatch, capsys):
    from lora_kernels.impl.cuda.tools import inspect

    monkeypatch.setattr(inspect, "absence", lambda part: None)
    monkeypatch.setattr(inspect, "cuobjdump", lambda *arguments: "")
    assert inspect.main(None) == 1
    assert "0 kernels" in capsys.readouterr().out

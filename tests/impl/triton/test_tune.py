"""`python -m lora_kernels tune`, with a timer that needs no GPU, and the file it leaves."""

import json
from dataclasses import replace

import pytest
import torch

from lora_kernels.__main__ import main
from lora_kernels._progress import Progress

pytest.importorskip("triton")

from lora_kernels.impl.triton.plan import tuned
from lora_kernels.impl.triton.plan.config import Config, LibraryConfig, Problem, illegal, shipped
from lora_kernels.impl.triton.plan.device import known
from lora_kernels.impl.triton.plan.plan import library_plan, plan, plan_of, rounded
from lora_kernels.impl.triton.tools import tune

DEVICE = known("NVIDIA H200")
LAYER = Problem(3000, 1024, 1024, 16, 16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_TUNED", str(tmp_path))
    tuned.planned.cache_clear()
    yield tmp_path
    tuned.planned.cache_clear()
    tuned._read.cache_clear()


def _unloved(problem=LAYER):
    """Return a legal configuration that the cost model doesn't choose."""
    legal = [c for c in shipped(problem) if illegal(c, problem, DEVICE) is None]
    return next(c for c in legal if c != plan(problem, DEVICE).config)


def test_fastest_is_kept_and_read_back(folder):
    lines, winner = [], _unloved()

    def timer(problem, config):
        if config.block_m == 32:
            raise RuntimeError("out of resources")
        return 1e-5 if config == winner else 2e-5

    found = tune.fastest(LAYER, DEVICE, timer, lines.append)
    assert found == (winner, 1e-5)
    assert any("out of resources" in line for line in lines)
    assert "2.00" in lines[-1]
    tuned.write(tuned.path_of(DEVICE), DEVICE, {tuned.key_of(LAYER): tuned.Measured(*found)})
    for m in (2049, 3000, 4096):  # batch shapes of one power of two share a measurement
        chosen = tuned.planned(LAYER._replace(m=m), DEVICE)
        assert (chosen.config, chosen.seconds, chosen.measured) == (winner, 1e-5, True)
        assert "measured 10.0 us" in str(chosen)
    other = LAYER._replace(dropout=True)
    assert tuned.planned(other, DEVICE) == plan(other, DEVICE)
    assert tuned.planned(LAYER, known("NVIDIA L40S")).measured is False
    assert [path.name for path in folder.iterdir()] == [tuned.path_of(DEVICE).name]


def test_the_library_plan_is_timed_and_kept(folder):
    """Its tiles aren't: they follow from the layer."""

    def timer(problem, config):
        return 1e-5 if isinstance(config, LibraryConfig) else 2e-5

    config, time = tune.fastest(LAYER, DEVICE, timer, lambda line: None)
    assert isinstance(config, LibraryConfig)
    tune._keep(tuned.path_of(DEVICE), DEVICE, tuned.key_of(LAYER), 9e-5, config, time)
    chosen = tuned.planned(LAYER, DEVICE)
    assert chosen == replace(library_plan(rounded(LAYER), DEVICE), seconds=1e-5, measured=True)
    assert "library plan; measured 10.0 us" in str(chosen)


def test_what_was_measured_slower_than_peft_is_not_taken(folder):
    """Its operators' time is the measured one where there is one."""
    path, key, peft = tuned.path_of(DEVICE), tuned.key_of(LAYER), plan(LAYER, DEVICE).predicted.peft
    slower, faster = tuned.Measured(_unloved(), 1.01 * peft), tuned.Measured(_unloved(), 0.9 * peft)
    for entry in (slower, faster._replace(peft=0.89 * peft)):
        tuned.write(path, DEVICE, {key: entry})
        assert tuned.planned(LAYER, DEVICE) == plan(LAYER, DEVICE)
    for entry in (faster, slower._replace(peft=1.02 * peft)):
        tuned.write(path, DEVICE, {key: entry})
        assert tuned.planned(LAYER, DEVICE).seconds == entry.seconds


def test_the_fewest_useful_configurations_are_kept_as_they_come():
    """After the library plan in the order of the cost model, which may be wrong."""
    timed, kept = [], []

    def timer(problem, config):
        timed.append(config)
        return {1: 3e-5, 2: 4e-5, 3: 1e-5}.get(len(timed), 2e-5)

    def keep(config, time):
        kept.append((len(timed), config, time))

    found = tune.fastest(LAYER, DEVICE, timer, lambda line: None, 3, keep)
    assert len(timed) == 4
    assert isinstance(timed[0], LibraryConfig)
    predicted = [plan_of(config, LAYER, DEVICE).seconds for config in timed[1:]]
    assert predicted == sorted(predicted)
    assert [number for number, *_ in kept] == [1, 3]
    assert found == kept[-1][1:] == (timed[2], 1e-5)


@pytest.mark.parametrize("most", ["0", "-1", "x"])
def test_how_many_are_timed_is_a_positive_number(most, capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--shapes", "1x1x1x1", "--most", most])
    expected = f"argument --most: expected a number of at least 1, got '{most}'"
    assert expected in capsys.readouterr().err


def test_the_command_counts_what_it_times(folder, monkeypatch, capsys):
    """On a stand-in for a GPU; a configuration that fails is counted, too."""
    times = iter(range(1, 100))
    counted = []

    def timer(problem, config):
        number = next(times)
        if number % 3 == 2:
            raise RuntimeError("out of resources")
        return number * 1e-5

    class Counter(Progress):
        def __init__(self, total, unit):
            super().__init__(total, unit)
            counted.append(total)

        def advance(self):
            counted.append(1)

    monkeypatch.setattr(tune, "Progress", Counter)
    monkeypatch.setattr(tune, "gpu_timer", lambda made: timer)
    monkeypatch.setattr(tune, "_seconds", lambda call: 1e-4)
    compiled = []
    monkeypatch.setattr(tune, "compile_all", lambda jobs, *_: compiled.extend(jobs))
    for name in ("frozen", "peft"):
        monkeypatch.setattr(tune, name, lambda problem, made: None)
    monkeypatch.setattr(tune, "of_gpu", lambda index: DEVICE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert main(["tune", "--shapes", "64x64x64x16", "--most", "3"]) == 0
    total, *steps = counted
    # Both directions, with and without dropout, four each; backward with dropout has one.
    assert total == len(steps) == len(compiled) == 13
    printed = capsys.readouterr().out
    assert "out of resources" in printed
    assert "frozen 100.0 us, PEFT's operators 100.0" in printed
    assert tuned.path_of(DEVICE).exists()


def test_later_runs_add_to_the_file(folder):
    path = tuned.path_of(DEVICE)
    for problem in (LAYER, LAYER._replace(backward=True)):
        found = tuned.Measured(_unloved(problem), 1e-5)
        tuned.write(path, DEVICE, {tuned.key_of(problem): found})
    assert len(json.loads(path.read_text())["plans"]) == 2


def test_a_configuration_that_became_illegal_is_not_used(folder):
    gone = Config(512, 512, 64, 8, 3)
    tuned.write(tuned.path_of(DEVICE), DEVICE, {tuned.key_of(LAYER): tuned.Measured(gone, 1e-5)})
    assert tuned.planned(LAYER, DEVICE) == plan(LAYER, DEVICE)


@pytest.mark.parametrize("text", ["{", "{}", '{"plans": {"a": {"config": {"rows": 1}}}}'])
def test_a_corrupt_file_is_named(folder, text):
    tuned.path_of(DEVICE).write_text(text)
    with pytest.raises(ValueError, match=r"NVIDIA-H200.*delete the file or tune again"):
        tuned.planned(LAYER, DEVICE)


def test_nothing_fast_is_an_error():
    def timer(problem, config):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no configuration"):
        tune.fastest(LAYER, DEVICE, timer, lambda line: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_command_needs_a_gpu_and_good_shapes(capsys):
    assert main(["tune", "--shapes", "8192x4096x4096x16"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    for shape in ("8192x4096", "0x1x1x1", "axbxcxd"):
        assert main(["tune", "--shapes", shape]) == 2
        assert "expected MxNxKxR" in capsys.readouterr().err

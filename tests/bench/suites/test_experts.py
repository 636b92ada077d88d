"""Blocks of experts: every provider computes what PEFT does, and what doesn't isn't timed."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from bench.measure import beside_peft
from bench.measure.beside_peft import FROZEN, OURS, PEFT, farthest
from bench.providers import experts as providers
from bench.providers.experts import LABELS, ExpertsCase
from bench.suites import experts
from tests.support.bench import Here

SMALL = ExpertsCase("small", 4, 2, 32, 16, 9, "fp32", r=4)


@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
@pytest.mark.parametrize("name", [name for name in LABELS if name not in (FROZEN, PEFT)])
def test_providers_compute_what_peft_does(name, kind):
    case = ExpertsCase("small", 4, 2, 32, 16, 9, "fp32", r=4, kind=kind)
    expected = providers.Call(case, PEFT).results()
    assert farthest(providers.Call(case, name).results(), expected) < 1e-4
    assert len(providers.Call(case, FROZEN).results()) == 2


def test_who_is_wrong_is_not_timed(monkeypatch):
    def doubled(block):
        return lambda *routed: 2 * block(*routed)

    monkeypatch.setitem(providers._CONVERSIONS, OURS, doubled)
    wrong = [line for line in experts.SUITE.measure(SMALL, 0.01, Here()) if "wrong" in line]
    assert len(wrong) == 1
    assert LABELS[OURS] in wrong[0]


def test_a_run_prints_every_provider(monkeypatch, capsys):
    monkeypatch.setattr(experts, "SUITE", replace(experts.SUITE, limits=((SMALL, 0.5, None),)))
    monkeypatch.setattr(beside_peft, "Probe", lambda device: Here())
    threads = torch.get_num_threads()
    try:
        assert experts.main(["--seconds", "0.01"]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "small: 4 experts" in printed
    assert "<=0.50" in printed
    assert all(label in printed for label in LABELS.values())
    assert "wrong" not in printed

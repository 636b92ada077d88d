"""How the benchmarks measure: whose turn it is, which rounds count, which ratios are quiet."""

import itertools

import pytest

from bench.measure import timing
from bench.measure.timing import Spread


def test_ratios_are_formed_round_by_round():
    theirs, ours = [1.0, 10.0, 100.0, 1000.0], [2.0, 20.0, 200.0, 2000.0]
    assert Spread.of_ratios(ours, theirs) == Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="zip"):
        Spread.of_ratios(ours, theirs[1:])


def test_rounds_rotate_tensors_and_who_comes_first():
    slots = [[f"{provider}{slot}" for provider in "abc"] for slot in range(4)]
    for turn in range(8):
        calls = timing.staggered(slots, turn)
        assert [call[0] for call in calls] == ["a", "b", "c"]
        assert len({call[1] for call in calls}) == 3, "two providers share a slot in a round"
    assert {timing.staggered(slots, turn)[0] for turn in range(4)} == {"a0", "a1", "a2", "a3"}
    assert [next(iter(timing.in_turn(3, first))) for first in range(3)] == [0, 1, 2]
    assert sorted(timing.in_turn(3, 1)) == [0, 1, 2]


def test_a_busy_machine_counts_no_round(monkeypatch):
    with timing.threads(2):
        meter = timing.Meter(seconds=0.01)
        for probes in ([False], [True, False]):  # busy before a round, and after it
            answers = itertools.cycle(probes)
            monkeypatch.setattr(meter, "_quiet", lambda answers=answers: next(answers))
            accepted, rejected = meter.rounds([[lambda: None]])
            assert accepted == []
            assert rejected > 0
        monkeypatch.setattr(meter, "_quiet", lambda: True)
        for seconds in (0.01, 0.0):  # calls may be long for the seconds that a case has
            meter.seconds = seconds
            accepted, rejected = meter.rounds([[lambda: None]])
            assert len(accepted) >= timing.MIN_ROUNDS
            assert rejected == 0


def test_a_probe_that_meets_a_stall_is_not_quiet(monkeypatch):
    with timing.threads(2):
        meter = timing.Meter(seconds=0.01)
    now = iter([0.0, 1e-4, 2e-4, 3e-4, 5e-3])  # the second region took 4.7 ms
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    assert not meter._quiet()


def test_quiet_ratios_have_their_quartiles_together():
    assert str(Spread(0.5, 0.492, 0.511)) == "0.50 (0.49-0.51)"
    assert str(Spread(0.5, 0.489, 0.511)) == "0.50 (0.49-0.51) ~"


def test_a_ratio_that_drifts_is_not_quiet():
    early, late = [0.987, 0.991, 0.995], [1.005, 1.009, 1.013]
    assert Spread.of([*early, *late]).drift == pytest.approx(0.018)
    assert Spread.of([*early, *late]).quiet
    mixed = Spread.of([0.985, 1.015, 0.985, 1.015])
    assert mixed.drift == 0.0
    assert mixed.quiet
    drifting = Spread.of([0.985, 0.985, 1.015, 1.015])
    assert drifting.drift == pytest.approx(0.03)
    assert not drifting.quiet

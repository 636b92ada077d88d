"""The layer suite: who is timed, on how many tensors."""

from types import SimpleNamespace

import pytest

from bench import shapes
from bench.measure import timing
from bench.measure.correctness import WRONG
from bench.measure.timing import Spread
from bench.providers.registry import BY_NAME
from bench.suites import layer
from tests.support.bench import SMALL, scaled_y, wrong


def test_a_wrong_provider_is_reported_and_not_timed():
    timed = []

    class Clock:
        def prepare(self, call):
            return call

        def rounds(self, slots):
            timed.extend(call for slot in slots for call in slot)
            return [[1.0] * len(slots[0])] * timing.MIN_ROUNDS, 0

    counted = SimpleNamespace(run=lambda *_: None)
    providers = [BY_NAME["base"], BY_NAME["peft"], wrong("wrong", scaled_y)]
    ceilings = SimpleNamespace(seconds=lambda case: 5e-4)
    session = SimpleNamespace(
        device="cpu", providers=providers, layer_clock=Clock(), probe=counted, ceilings=ceilings,
        cache_bytes=1,
    )  # fmt: skip
    rows = {row.provider: row for row in layer.measure(SMALL, session)}
    assert rows["wrong"].state == WRONG
    assert rows["wrong"].ms is None
    assert len(timed) == 2 * rows["peft"].slots
    assert rows["peft"].state == timing.TIMED
    assert rows["peft"].roofline == pytest.approx(0.5)
    assert rows["base"].over_peft == Spread(1.0, 1.0, 1.0)
    assert rows["base"].over_base is None


def test_slots_exceed_the_cache():
    size = shapes.floor_bytes(SMALL)
    assert layer.slot_count(SMALL, 5 * size) == 10
    assert layer.slot_count(SMALL, 1) == 2
    assert layer.slot_count(SMALL, 10**12) == layer.MAX_SLOTS

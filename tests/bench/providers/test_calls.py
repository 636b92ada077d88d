"""A provider's call on one set of tensors."""

from bench.providers.calls import make_slots
from bench.providers.registry import BY_NAME
from tests.support.bench import SMALL


def test_a_call_keeps_no_gradients():
    """What one round keeps decides where the heap has room in the next."""
    [[call]] = make_slots([BY_NAME["peft"]], SMALL, "cpu", 1)
    call()
    assert all(leaf.grad is None for leaf in call.leaves)
    assert call.results().keys() == {"y", "dx", "da", "db"}
    assert all(leaf.grad is None for leaf in call.leaves)

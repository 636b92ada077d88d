"""The table of rates: what it says of each GPU, and what it refuses."""

import json

import pytest

from lora_kernels.impl.triton.plan import rates
from lora_kernels.impl.triton.plan.rates import MARKS, Rates, rates_of

SHIPPED = rates.shipped()


def test_the_table_is_what_is_written_of_it():
    assert rates.read(rates.written(SHIPPED)) == SHIPPED
    assert rates.written(SHIPPED) == (rates.files(rates.__package__) / rates.TABLE).read_text()


def test_marks_and_sources():
    """What nobody measured says so; what somebody did has a place to look it up."""
    for group in SHIPPED.values():
        for entries in group.values():
            for rate in entries.values():
                assert rate.mark in MARKS
                assert ("estimate" in rate.source or "assumed" in rate.source) == (
                    rate.mark == rates.NOT_MEASURED
                )


@pytest.mark.parametrize(
    ("capability", "generation"),
    [((8, 0), "8.0"), ((8, 6), "8.0"), ((8, 9), "8.9"), ((9, 0), "9.0"), ((10, 3), "10.0"),
     ((12, 0), "8.9"), ((7, 5), "8.9")],
)  # fmt: skip
def test_a_gpu_has_the_rates_of_its_generation(capability, generation):
    found = rates_of("a GPU of tomorrow", capability)
    own = {name: rate.value for name, rate in SHIPPED["generations"][generation].items()}
    common = {name: rate.value for name, rate in SHIPPED["any"][""].items()}
    assert found == Rates(**common, **own)


def _changed(change):
    data = json.loads(rates.written(SHIPPED))
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("gpus"), "expected any, generations and gpus"),
        (lambda d: d["any"]["pass_seconds"].update(value=0), "any : pass_seconds: expected a pos"),
        (lambda d: d["any"]["pass_seconds"].update(value="1"), "pass_seconds: expected a positive"),
        (lambda d: d["any"]["pass_seconds"].update(mark="guessed"), "expected a mark and a source"),
        (lambda d: d["any"]["pass_seconds"].pop("source"), "expected any, generations and gpus"),
        (lambda d: d["any"].update(speed=d["any"]["pass_seconds"]), "got 'speed'"),
    ],
)
def test_what_is_no_table_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        rates.read(_changed(change))

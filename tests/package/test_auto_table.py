"""The table of what "auto" takes is what the rules say, on whichever machine they are asked."""

import pytest

from lora_kernels.impl.triton.support import _launcher_refusal
from lora_kernels.native import absence
from tests.support import auto_table
from tests.support.auto_table import CALLS, MACHINES, PAGE, cells, with_block


@pytest.fixture(autouse=True)
def _with_triton_and_the_compiled_part():
    reason = absence("cpu") or _launcher_refusal()
    if reason is not None:
        pytest.skip(f"another machine's table would have other implementations: {reason}")


def test_the_page_has_the_table_of_the_rules():
    assert with_block(PAGE.read_text()) == PAGE.read_text(), (
        "python -m tests.support.auto_table writes it"
    )


def test_every_call_is_served_everywhere_and_for_a_reason():
    found = cells()
    assert len(found) == len(MACHINES) * len(CALLS)
    for cell in found.values():
        assert cell.text
    of_gpus = [cell for (machine, _), cell in found.items() if machine.capability is not None]
    assert all(cell.reasons for cell in of_gpus if cell.text != "triton")


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match=r"docs/compatibility.md: expected"):
        auto_table.with_block("no table")

"""The census: a few of its rows, and that docs/models.md is what it writes of today's models."""

import re

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from tests.census.measure import measured
from tests.census.models import SUBJECTS
from tests.census.page import COLUMNS, HEAD, MARK, PAGE, equal, row, written

# Adapted wherever they are linear, nothing of these is left to PEFT.
WHOLE = [
    *("Llama", "Qwen2.5", "Qwen3", "Gemma 3", "Mistral", "GPT-2", "Falcon", "BERT", "T5"),
    *("Whisper", "CLIP", "ViT", "FLUX.1", "SD3"),
]


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Falcon", "BERT", "T5", "ViT"])
def test_all_linear_layers_are_fused_and_equal(name):
    found = measured(name, "all-linear", seeds=(1,))
    assert found.fused == found.layers == found.linear > 0
    assert not found.left
    assert equal(found), found
    assert found.ratio < 2
    assert row(found).split(" | ")[2] == f"{found.fused} / {found.layers}"


def test_a_row_says_what_is_left():
    found = measured("Qwen3-MoE", "all-linear", seeds=())
    assert found.left == {"weight has no experts, or one": 2}  # the routers
    assert (found.fused, found.layers) == (12, 14)
    assert 0 < found.parameters < 1
    assert equal(found)
    assert not equal(found._replace(gradient=1e-3))
    assert not equal(found._replace(tokens=False))
    page = written([found._replace(ratio=1.0)])
    assert "weight has no experts, or one | Qwen3-MoE, all-linear: 2 |" in page


def test_the_page_is_in_step():
    """Its models and recipes are the census's; run `make census` after a change of these."""
    page = PAGE.read_text()
    assert page.startswith(MARK)
    lines = page[page.index(HEAD) :].split("\n\n")[0].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in lines]
    expected = [(name, recipe) for name, s in SUBJECTS.items() for recipe in s.recipes]
    assert [(cells[0], cells[1]) for cells in rows] == expected
    assert all(len(cells) == len(COLUMNS) for cells in rows)
    assert all(cells[-1].startswith("yes") for cells in rows)
    for cells in rows:
        if cells[0] in WHOLE and cells[1] == "all-linear":
            fused, layers = map(int, re.fullmatch(r"(\d+) / (\d+)", cells[2]).groups())
            assert fused == layers > 0, cells

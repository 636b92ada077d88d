"""The tables of docs/benchmarks.md are those of the file that it names."""

import json

import pytest

from bench.report import docs_tables
from tests.support.paths import ROOT


def test_the_page_shows_the_results_that_it_names():
    text = docs_tables.PAGE.read_text()
    [named] = docs_tables.BLOCK.findall(text)
    assert docs_tables.with_block(text, ROOT / named) == text


def test_the_published_tables_are_not_emptied():
    text = docs_tables.PAGE.read_text()
    name = docs_tables.BLOCK.findall(text)[0]
    data = json.loads((ROOT / name).read_text())
    empty = ROOT / "build" / "empty-results.json"
    empty.parent.mkdir(exist_ok=True)
    empty.write_text(json.dumps({**data, "rows": {}}))
    try:
        with pytest.raises(ValueError, match="expected rows for the tables, got none"):
            docs_tables.with_block(text, empty)
    finally:
        empty.unlink()

"""The file of a run is whole at any moment."""

import json
from dataclasses import dataclass

import pytest

from bench.measure import results_file
from bench.measure.timing import Spread


@dataclass(frozen=True)
class _Row:
    """A row of a suite that there is not."""

    provider: str
    ms: Spread


def test_results_are_whole_after_each_point(tmp_path):
    path = tmp_path / "new" / results_file.FILE
    kept = results_file.Results(path, {"run": {"revision": "abc"}, "value": 1 / 3})
    for count in range(3):
        assert {suite: len(rows) for suite, rows in results_file.load(path)["rows"].items()} == (
            {"layer": count} if count else {}
        )
        kept.add("layer", [_Row("cpu", Spread(1 / 3, 0.25, 0.5))])
    row = results_file.load(path)["rows"]["layer"][0]
    assert (row.provider, row.ms.median) == ("cpu", 0.33333)
    assert json.loads(path.read_text())["value"] == 0.33333
    other = tmp_path / "other.json"
    other.write_text('{"rows": 3}')
    with pytest.raises(ValueError, match="expected results of"):
        results_file.load(other)

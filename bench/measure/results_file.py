"""The file of a run: what was measured, on what, written anew after each point."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.measure.timing import Spread

FILE = "results.json"
SPREAD = {field.name for field in fields(Spread)}
LATER = {"drift"}  # which older files don't have
DIGITS = 5  # of numbers that were measured


class Results:
    """Rows by suite beside what is said of the run; the file is whole at any moment."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self._about = path, {**about, "interrupted": False}
        self._rows: dict[str, list[str]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, suite: str, rows: Iterable[Any]) -> None:
        """Keep rows, dataclasses, of a suite."""
        lines = (json.dumps(_rounded(asdict(row)), separators=(",", ":")) for row in rows)
        self._rows.setdefault(suite, []).extend(lines)
        self._write()

    def interrupt(self) -> None:
        """Say that the run was ended before its end."""
        self._about["interrupted"] = True
        self._write()

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def _write(self) -> None:
        # A line for each row: small, and a difference between two files can be read.
        rows = ",\n".join(
            f'"{suite}": [\n' + ",\n".join(lines) + "\n]" for suite, lines in self._rows.items()
        )
        about = json.dumps(_rounded(self._about), indent=1).removesuffix("\n}")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(f'{about},\n "rows": {{\n{rows}\n}}\n}}\n')
        temporary.replace(self.path)


def load(path: Path) -> dict[str, Any]:
    """Read a file of results; its rows have attributes, row.case.m, and spreads are `Spread`s.

    Raises:
        OSError: there is no such file.
        ValueError: it is not one of results.
    """
    try:
        data = json.loads(path.read_text())
        data["rows"] = {
            suite: [_with_attributes(row) for row in rows] for suite, rows in data["rows"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        message = f"{path}: expected results of `python -m bench`, got {error!r}"
        raise ValueError(message) from error
    return data


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _with_attributes(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() | LATER == SPREAD:
            return Spread(**value)
        return SimpleNamespace(**{key: _with_attributes(item) for key, item in value.items()})
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_with_attributes(item) for item in value]
    return value

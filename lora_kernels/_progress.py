"""Progress of the package's tools: a bar on stderr, where that is a terminal and tqdm is there."""

import sys
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any


class Progress:
    """A context in which `total` steps are counted; what `say` prints stands above the bar."""

    def __init__(self, total: int, unit: str) -> None:
        self._bar: Any = None
        if find_spec("tqdm") is not None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, unit=unit, file=sys.stderr, disable=None, dynamic_ncols=True
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        """Count a step."""
        if self._bar is not None:
            self._bar.update()

    def say(self, line: str) -> None:
        """Print a line on stdout."""
        aside = nullcontext() if self._bar is None else self._bar.external_write_mode()
        with aside:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

"""What an executor keeps from call to call, so that a call finds it by one look."""

from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")


class Kept:
    """Values by key, made when first asked for; all are forgotten when there are `most`.

    So it stays small whatever a process does, and a look takes no lock: at worst two threads make
    the same value.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: dict[Hashable, object] = {}

    def __len__(self) -> int:
        return len(self._values)

    def find(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key."""
        found = self._values.get(key)
        if found is None:
            found = make()
            self.keep(key, found)
        return found  # type: ignore[return-value]  # what `make` made for the key

    def get(self, key: Hashable) -> object:
        """Return the value of a key, or None."""
        return self._values.get(key)

    def keep(self, key: Hashable, value: object) -> None:
        """Keep a value."""
        if len(self._values) >= self._most:
            self._values.clear()
        self._values[key] = value

"""What reports say, as text and for notebooks: a headline, and layers grouped by what is alike."""

from collections.abc import Mapping
from html import escape
from typing import NamedTuple


class Group(NamedTuple):
    """Layers of which a report says the same: `what`, such as "left", and the reason, if any.

    in_headline: whether the headline says so already.
    """

    what: str
    reason: str | None
    paths: list[str]
    in_headline: bool = False

    @property
    def some(self) -> str:
        """The first three paths, and how many more there are."""
        more = f" and {len(self.paths) - 3} more" if len(self.paths) > 3 else ""
        return ", ".join(path or "the layer" for path in self.paths[:3]) + more


def grouped(what: str, reasons: Mapping[str, str | None]) -> list[Group]:
    """Return a group for each reason, in the order of its first path; None is a reason, too."""
    paths: dict[str | None, list[str]] = {}
    for path, reason in reasons.items():
        paths.setdefault(reason, []).append(path)
    return [Group(what, reason, found) for reason, found in paths.items()]


class Summary:
    """Prints as a headline and a line for each group; in notebooks as a table of them."""

    def _headline(self) -> str:
        raise NotImplementedError

    def _groups(self) -> list[Group]:
        raise NotImplementedError

    def __str__(self) -> str:
        lines = [self._headline()]
        for group in self._groups():
            reason = f" ({group.reason})" if group.reason else ""
            if not group.in_headline:
                lines.append(f"  {group.what}{reason}: {group.some}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("layers", "what", "reason", "which"))
        rows = [(len(g.paths), g.what, g.reason or "", g.some) for g in self._groups()]
        cells = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        return (
            f"<table><caption>{escape(self._headline())}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

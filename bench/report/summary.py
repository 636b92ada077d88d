"""What a run comes to: the providers over all points, what failed, what is over its limit."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bench.measure.correctness import REFUSED, WRONG
from bench.measure.footprint import MIB
from bench.measure.timing import TIMED
from bench.providers.registry import BY_NAME, OURS, label
from bench.report.growth import fits
from bench.report.tables import case_of, is_measured
from bench.shapes import GROWTH, MODES, how_kept, reference_of


class Short(NamedTuple):
    """A provider over all points of one kind: middle, least and most of its ratios."""

    what: str
    provider: str
    points: int
    over_peft: str
    over_base: str


def in_short(rows: dict[str, list[Any]]) -> list[Short]:
    """Return every provider's ratios over the layers of models, by mode, and over the steps."""
    layers = [row for row in rows.get("layer", []) if row.case.model != GROWTH]
    kinds = {
        f"a layer, {name}": [row for row in layers if row.case.mode == mode]
        for mode, name in MODES.items()
    }
    for row in rows.get("step", []):
        kinds.setdefault(f"training step{how_kept(row.case)}", []).append(row)
    return [short for what, given in kinds.items() for short in _shorts(what, given)]


def _shorts(what: str, rows: Sequence[Any]) -> Iterator[Short]:
    timed = [row for row in rows if row.state == TIMED]
    for name in BY_NAME:
        if not (own := [row for row in timed if row.provider == name]):
            continue
        over_peft, over_base = (
            _spread(getattr(row, ratio) for row in own) for ratio in ("over_peft", "over_base")
        )
        yield Short(what, label(name), len(own), over_peft, over_base)


def _spread(ratios: Iterable[Any]) -> str:
    values = [ratio.median for ratio in ratios if ratio is not None]
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def growth(rows: dict[str, list[Any]]) -> list[str]:
    """Return a line for each of ours: whether it grows faster than the frozen base, and with what.

    R is left out, since the base knows none.
    """
    found = [fit for fit in fits(rows.get("layer", [])) if fit.verdict != "-"]
    lines = []
    for name in (name for name in OURS if any(fit.provider == name for fit in found)):
        own = [fit for fit in found if fit.provider == name]
        faster = [f"{f.axis.upper()} ({f.dtype}, p={f.p:g})" for f in own if f.verdict == "yes"]
        axes = ", ".join(dict.fromkeys(fit.axis.upper() for fit in own))
        says = f"faster than the frozen base with {', '.join(faster)}" if faster else (
            f"no faster than the frozen base with any of {axes}"
        )  # fmt: skip
        lines.append(f"{label(name)}: forward + backward grows {says}")
    return lines


def faults(rows: dict[str, list[Any]]) -> list[str]:
    """Return a line for each result that the gate refused, or that a busy machine prevented."""
    found = []
    for suite, row in _all(rows):
        state = getattr(row, "state", WRONG)
        if getattr(row, "reason", "") and state != REFUSED:
            found.append(f"{suite}, {case_of(row)}, {_who(row)}: {state}: {row.reason}")
    return found


def complaint(rows: dict[str, list[Any]]) -> str | None:
    """Return why a run shows nothing: no row holds a figure, or one of ours is wrong."""
    everything = [row for _, row in _all(rows)]
    if not any(map(is_measured, everything)):
        return "nothing was measured"
    for row in everything:
        ours = getattr(row, "provider", getattr(row, "call", None)) in OURS
        if ours and not is_measured(row) and getattr(row, "state", WRONG) == WRONG:
            return f"{case_of(row)}, {_who(row)}: {row.reason}"
    return None


def exceeded(rows: dict[str, list[Any]]) -> list[str]:
    """Return a line for each figure that is over the limit that the project has set it."""
    found = []
    steps = rows.get("step", [])
    peaks = {repr(r.case): r.peak_bytes for r in steps if r.provider == reference_of(r.case)}
    for suite, row in _all(rows):
        reached = _limited(row)
        if reached is not None and reached > row.limit:
            found.append(
                f"{suite}, {case_of(row)}, {_who(row)}: {reached:.3f}, limit {row.limit:.3f}"
            )
        limit = getattr(row, "memory_limit", None)
        if limit is not None and row.peak_bytes > limit * peaks[repr(row.case)]:
            peak, most = row.peak_bytes / MIB, limit * peaks[repr(row.case)] / MIB
            found.append(
                f"{suite}, {case_of(row)}, {_who(row)}: {peak:.0f} MiB, limit {most:.0f} MiB"
            )
    return found


def _limited(row: Any) -> float | None:
    """Return what a row's limit is for: a ratio of times or of bytes."""
    if getattr(row, "limit", None) is None:
        return None
    for ratio in ("over_peft", "over_dropout"):
        if (spread := getattr(row, ratio, None)) is not None:
            return float(spread.median)
    return float(row.saved_bytes / row.x_bytes) if hasattr(row, "x_bytes") else None


def _all(rows: dict[str, list[Any]]) -> Iterator[tuple[str, Any]]:
    return ((suite, row) for suite, given in rows.items() for row in given)


def _who(row: Any) -> str:
    if hasattr(row, "provider"):
        return label(row.provider)
    return f"{label(row.call)} {row.mode}".strip() if hasattr(row, "call") else "dropout mask"

"""The report's tables: rows of a results file as text, one cell each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.measure.footprint import MIB
from bench.measure.timing import LOUD_MARK, QUIET, TIMED
from bench.providers.registry import label
from bench.report.growth import fits
from bench.shapes import GROWTH, how_kept

Column = tuple[str, Callable[[Any], str]]
RATIO_NOTE = (
    "Ratios are medians, with quartiles, of those formed within each round of interleaved calls; "
    f"{LOUD_MARK} marks quartiles more than {QUIET:.0%} apart, or medians of the earlier and the "
    f"later half more than {QUIET / 2:.1%}: the machine wasn't quiet."
)
NOTES = {
    "layer": (
        f"{RATIO_NOTE} roof: the least time that the measured ceilings allow for the formulas' "
        "FLOPs and bytes, over the time taken; the ceiling is one large product's, which others "
        "may pass by a little. ops: operators that compute (CUDA: kernels), views and allocations "
        "aside. peak: what the call adds to the memory in use, gradients included. saved: kept for "
        "backward beyond x and the parameters. Tensors rotate through more than the last cache "
        "holds."
    ),
    "growth": (
        "Least-squares slopes of log time over log size, with standard errors; all other sizes "
        "stay at the point that the figure's title names. Against the base: the slope of the ratio "
        "to the frozen base; faster means more than two standard errors above zero. The base knows "
        "no R."
    ),
    "step": f"{RATIO_NOTE} Peak: what a step adds to a process's memory, after one warmed it up.",
    "overhead": f"{RATIO_NOTE} One thread's CPU time of a call too small to take time: 1x64x64.",
    "mask": f"{RATIO_NOTE} The compiled generator beside torch's F.dropout, 2048 x 2048.",
    "memory": (
        "Counted, not timed: bytes kept for backward beyond x and the parameters, and what forward "
        "and backward add to the memory in use."
    ),
    "kernels": (
        "Counted and compiled, not measured: nothing here ran on a GPU, and no cache, latency or "
        "occupancy is modelled. Executed in a PTX virtual machine, by 16 programs; registers, "
        "spills and shared memory as ptxas reports them for the largest launch. Other frameworks' "
        "launches are a plain product in the same tiles and simple passes. Predicted: the cost "
        "model's, from the vendor's rates; large is 8192x4096x4096, R = 16."
    ),
}


@dataclass(frozen=True)
class Section:
    """A table of the page. suite: whose it is; its figures' names begin with `figures`."""

    suite: str
    title: str
    note: str
    figures: tuple[str, ...]
    heads: list[str]
    rows: list[list[str]]


def sections(rows: dict[str, list[Any]]) -> list[Section]:
    """Return the page's sections in their order; a suite without rows has none."""
    timed = {suite: [r for r in given if is_measured(r)] for suite, given in rows.items()}
    shapes = [row for row in timed.get("layer", []) if row.case.model != GROWTH]
    sweeps = [row for row in timed.get("layer", []) if row.case.model == GROWTH]
    wanted: list[tuple[str, str, tuple[str, ...], list[Column], Sequence[Any]]] = [
        ("layer", "Layers", ("speedup", "roofline"), LAYER, shapes),
        ("growth", "Growth", ("growth", "overhead"), FIT, fits(sweeps)),
        ("step", "Training step", ("step",), STEP, timed.get("step", [])),
        ("overhead", "A tiny call", (), CALL, timed.get("overhead", [])),
        ("mask", "Dropout mask", (), MASK, rows.get("mask", [])),
        ("memory", "Memory", ("memory",), MEMORY, timed.get("memory", [])),
        ("kernels", "GPU kernels, counted", ("kernels",), KERNEL, rows.get("kernels", [])),
        ("layer", "Layers of the sweeps", (), LAYER, sweeps),
    ]
    return [
        Section(
            suite,
            title,
            NOTES[suite],
            figures,
            [head for head, _ in columns],
            [[show(row) for _, show in columns] for row in chosen],
        )
        for suite, title, figures, columns, chosen in wanted
        if chosen
    ]


def is_measured(row: Any) -> bool:
    """Whether a row holds figures, not only the reason why it has none."""
    return getattr(row, "state", TIMED) == TIMED and not getattr(row, "reason", "")


def case_of(row: Any) -> str:
    """Return a row's case in words."""
    case = getattr(row, "case", None)
    if case is None:
        return "a tiny call"
    adapters = "" if case.adapters == case.dtype else f", {case.adapters} adapters"
    if hasattr(case, "sizes"):
        return f"{case.sizes.name} {case.dtype}{adapters}{how_kept(case)} p={case.p:g}"
    size = f"{case.m}x{case.n}x{case.k} r={case.r}"
    what = f"{case.model} {case.projection} {size} {case.dtype}{adapters}{how_kept(case)}"
    return f"{what} p={case.p:g} {case.mode}"


def _or_dash(value: Any, text: str = "{}") -> str:
    return "-" if value is None else text.format(value)


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / MIB:.2f}"


def _footprint(field: str) -> Callable[[Any], str]:
    def show(row: Any) -> str:
        value = None if row.footprint is None else getattr(row.footprint, field)
        return _or_dash(value) if field == "launches" else _mib(value)

    return show


def _counted(field: str, unit: float, text: str) -> Callable[[Any], str]:
    def show(row: Any) -> str:
        return "-" if row.counts is None else text.format(getattr(row.counts, field) / unit)

    return show


def _mma_share(row: Any) -> str:
    counts = row.counts
    return "-" if counts is None else f"{counts.mma_instructions / counts.instructions:.1%}"


_WHO: Column = ("provider", lambda row: label(row.provider))
_MS: Column = ("ms", lambda row: f"{row.ms.median:.3f}")
_QUARTILES: Column = ("quartiles", lambda row: f"{row.ms.low:.3f}-{row.ms.high:.3f}")
_OVER_PEFT: Column = ("/ PEFT", lambda row: _or_dash(row.over_peft))
_OVER_BASE: Column = ("/ frozen base", lambda row: _or_dash(row.over_base))
_LIMIT: Column = ("limit", lambda row: _or_dash(row.limit, "{:.2f}"))

# Columns of words, which stand to the left.
WORDS = ("case", "provider", "call", "mode", "kernels", "arch", "dtype")

LAYER: list[Column] = [
    ("case", case_of), _WHO, _MS, _QUARTILES, _OVER_PEFT, _OVER_BASE, _LIMIT,
    ("roof", lambda row: _or_dash(row.roofline, "{:.0%}")),
    ("GFLOP", lambda row: f"{row.flops / 1e9:.3f}"),
    ("floor MB", lambda row: f"{row.floor_bytes / 1e6:.2f}"),
    ("ops", _footprint("launches")),
    ("peak MiB", _footprint("peak_bytes")),
    ("saved MiB", _footprint("saved_bytes")),
    ("rounds", lambda row: f"{row.rounds} of {row.rounds + row.rejected}"),
]  # fmt: skip
FIT: list[Column] = [
    ("size", lambda fit: fit.axis.upper()),
    ("dtype", lambda fit: f"{fit.dtype} p={fit.p:g}"),
    _WHO,
    ("sizes", lambda fit: ", ".join(map(str, fit.sizes))),
    ("ms", lambda fit: ", ".join(f"{ms:.2f}" for ms in fit.ms)),
    ("slope", lambda fit: f"{fit.slope:.3f} ± {fit.error:.3f}"),
    (
        "against the base",
        lambda fit: (
            "-"
            if fit.against_base is None
            else f"{fit.against_base:+.3f} ± {fit.against_error:.3f}"
        ),
    ),
    ("grows faster than the base", lambda fit: fit.verdict),
]
STEP: list[Column] = [
    ("case", case_of), _WHO, _MS, _QUARTILES, _OVER_PEFT, _OVER_BASE, _LIMIT,
    ("peak MiB", lambda row: _mib(row.peak_bytes)),
    ("rounds", lambda row: f"{row.rounds} of {row.rounds + row.rejected}"),
]  # fmt: skip
CALL: list[Column] = [
    ("call", lambda row: label(row.call)),
    ("mode", lambda row: row.mode),
    ("µs", lambda row: f"{row.us:.1f}"),
    _OVER_PEFT,
    _LIMIT,
]
MASK: list[Column] = [
    ("threads", lambda row: str(row.threads)),
    ("ns an element", lambda row: f"{row.ns:.3f}"),
    ("/ F.dropout", lambda row: str(row.over_dropout)),
    _LIMIT,
]
MEMORY: list[Column] = [
    ("case", case_of),
    ("N of each layer", lambda row: ", ".join(map(str, row.widths))),
    _WHO,
    ("x MiB", lambda row: _mib(row.x_bytes)),
    ("saved MiB", lambda row: f"{row.saved_bytes / MIB:.3f}"),
    ("saved / x", lambda row: f"{row.saved_bytes / row.x_bytes:.3f}"),
    _LIMIT,
    ("peak MiB", lambda row: _mib(row.peak_bytes)),
]
KERNEL: list[Column] = [
    ("arch", lambda row: f"sm_{row.arch}"),
    ("call", lambda row: f"{row.direction} p={'0.1' if row.dropout else '0'}"),
    ("size", lambda row: "x".join(map(str, row.size[:3])) + f" r={row.size[3]}"),
    ("kernels", lambda row: f"{row.what} {row.config}".strip()),
    ("launches", lambda row: str(row.launches)),
    ("k instructions", _counted("instructions", 1e3, "{:,.0f}")),
    ("MMA share", _mma_share),
    ("GFLOP of MMA", _counted("flops", 1e9, "{:.3f}")),
    ("touched MB", _counted("unique_bytes", 1e6, "{:.2f}")),
    ("requested MB", _counted("requested_bytes", 1e6, "{:.2f}")),
    ("bank conflicts", _counted("conflicts", 1, "{:.0f}")),
    ("producing / plain tile", lambda row: _or_dash(row.producing_ratio, "{:.2f}")),
    ("registers", lambda row: str(row.compiled.registers)),
    ("spilt B", lambda row: str(row.compiled.spill_bytes)),
    ("shared KiB", lambda row: f"{row.compiled.shared_bytes / 1024:.0f}"),
    ("predicted µs", lambda row: f"{row.predicted_us:.1f}"),
    ("predicted µs, large", lambda row: f"{row.large_us:.0f}"),
]

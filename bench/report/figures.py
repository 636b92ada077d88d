"""The report's figures, drawn with matplotlib from the rows of a results file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from bench.measure.footprint import MIB
from bench.measure.timing import TIMED
from bench.providers.registry import FLOOR, REFERENCE, label
from bench.report.growth import Fit, common_point, fits, swept
from bench.shapes import GROWTH, MODES, how_kept

# Ours in strong colours, what others do in pale ones.
COLORS = {
    FLOOR: "#777777", REFERENCE: "#c0504d", "peft16": "#e3a19f", "addmm": "#e39a3b",
    "compile": "#b58ac9", "merged": "#444444", "eager": "#7fb2d6", "cpu": "#1f77b4",
    "packed": "#0b3d70", "triton": "#2ca02c", "cuda": "#145214",
    "unsloth": "#bcbd22", "lorafusion": "#17becf", "liger": "#e377c2",
    "bitsandbytes": "#8c564b", "cpu-codes": "#393b79", "triton-codes": "#637939",
}  # fmt: skip
MARKERS = dict(zip(COLORS, "os^DvP>*Xh8Hpd<p1", strict=True))
WIDTH = 9.0  # inches
AXES = {"m": "tokens M", "n": "out_features N", "k": "in_features K", "r": "rank R"}
HEADROOM = 0.6  # of a panel's height on a log scale, for its legend
ROOM = 0.85  # of a group for its bars
# Of the kernels suite, which has no providers.
KERNEL_COLORS = {
    "plain product": COLORS[FLOOR],
    "PEFT's launches": COLORS[REFERENCE],
    "addmm's launches": COLORS["addmm"],
    "ours": COLORS["triton"],
}
Bars = Iterable[tuple[str, str, float]]  # group, series, value


def figures(rows: dict[str, list[Any]], ceilings: dict[str, Any]) -> dict[str, Figure]:
    """Return every figure that the rows allow, by file name without its ending."""
    timed = [row for row in rows.get("layer", []) if row.state == TIMED]
    shapes = [row for row in timed if row.case.model != GROWTH and row.over_peft is not None]
    found: dict[str, Figure] = {}
    for dtype, mode in sorted({(row.case.dtype, row.case.mode) for row in shapes}):
        chosen = [row for row in shapes if (row.case.dtype, row.case.mode) == (dtype, mode)]
        found[f"speedup-{dtype}-{mode}"] = speedup(chosen, f"{MODES[mode]}, {dtype}")
    grown = [row for row in timed if row.case.model == GROWTH]
    for dtype in sorted({row.case.dtype for row in grown}):
        found[f"overhead-{dtype}"] = overhead(grown, dtype)
        found[f"growth-{dtype}"] = growth(fits(grown), dtype, common_point(grown))
    for dtype in sorted({row.case.dtype for row in timed}):
        chosen = [row for row in timed if row.case.dtype == dtype]
        found[f"roofline-{dtype}"] = roofline(chosen, dtype, ceilings)
    return found | _of_bars(rows)


def _of_bars(rows: dict[str, list[Any]]) -> dict[str, Figure]:
    """Return the figures of memory, steps and counted kernels."""
    found: dict[str, Figure] = {}
    saved = [r for r in rows.get("memory", []) if r.saved_bytes is not None and r.provider != FLOOR]
    if saved:
        found["memory"] = memory(saved)
    steps = [row for row in rows.get("step", []) if row.state == TIMED]
    if steps:
        found["step"] = step(steps)
    executed = [row for row in rows.get("kernels", []) if row.counts is not None]
    if executed:
        found["kernels"] = kernels(executed)
    return found


def speedup(rows: Sequence[Any], what: str) -> Figure:
    """Draw PEFT's time over each provider's, a line for each shape."""
    names = list(dict.fromkeys(_shape_name(row.case) for row in rows))
    figure = Figure(figsize=(WIDTH, 1.8 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    for provider, group in by_provider(rows):
        ratios = [row.over_peft for row in group]
        middle = [1 / ratio.median for ratio in ratios]
        below = [at - 1 / ratio.high for at, ratio in zip(middle, ratios, strict=True)]
        above = [1 / ratio.low - at for at, ratio in zip(middle, ratios, strict=True)]
        lines = [names.index(_shape_name(row.case)) for row in group]
        axes.errorbar(
            middle, lines, xerr=[below, above], fmt=MARKERS[provider], color=COLORS[provider],
            markersize=5, elinewidth=1, label=label(provider),
        )  # fmt: skip
    axes.axvline(1, color=COLORS[REFERENCE], linewidth=1, label=label(REFERENCE))
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("times as fast as PEFT; to the right is faster, bars are quartiles")
    axes.set_title(f"Speed over PEFT's: {what}")
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return figure


def _shape_name(case: Any) -> str:
    adapters = "" if case.adapters == case.dtype else f", {case.adapters} adapters"
    dropout = f" p={case.p:g}" if case.mode == "train" else ""
    size = f"{case.m}x{case.n}x{case.k} r={case.r}"
    return f"{case.model} {case.projection}  {size}{dropout}{adapters}{how_kept(case)}"


def overhead(rows: Sequence[Any], dtype: str) -> Figure:
    """Draw what each provider's time is above the frozen base's, against R and against M."""
    rows = [row for row in rows if row.over_base is not None]
    dropouts = sorted({row.case.p for row in rows})
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, axis in zip(panels, ("r", "m"), strict=True):
        for provider, group in by_provider(rows):
            for p in dropouts:
                points = swept(group, axis, dtype, p, provider)
                x = [getattr(row.case, axis) for row in points]
                y = [100 * (row.over_base.median - 1) for row in points]
                axes.plot(
                    x, y, "--" if p else "-", marker=MARKERS[provider], markersize=4,
                    color=COLORS[provider], label=f"{label(provider)}, p={p:g}",
                )  # fmt: skip
        axes.axhline(0, color=COLORS[FLOOR], linewidth=1)
        _size_axis(axes, axis, [getattr(row.case, axis) for row in rows])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("time above the frozen base's, %")
    figure.suptitle(f"Overhead over the frozen base: forward + backward, {dtype}")
    legend_below(figure, panels[0], columns=3)
    return figure


def growth(grown: Sequence[Fit], dtype: str, common: Mapping[str, int]) -> Figure:
    """Draw times against each size on a log scale, with the fitted slopes."""
    p = max(fit.p for fit in grown)
    chosen = [fit for fit in grown if fit.dtype == dtype and fit.p == p]
    figure = Figure(figsize=(WIDTH, 7.5), layout="constrained")
    panels = figure.subplots(2, 2)
    for axes, axis in zip(panels.flat, AXES, strict=True):
        for fit in sorted((f for f in chosen if f.axis == axis), key=_legend_order):
            name = f"{label(fit.provider)}: {fit.slope:.2f} ± {fit.error:.2f}"
            axes.plot(
                fit.sizes, fit.ms, "-", marker=MARKERS[fit.provider], markersize=4,
                color=COLORS[fit.provider], label=name,
            )  # fmt: skip
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** HEADROOM)
        axes.set_ylabel("ms")
        _size_axis(axes, axis, [size for fit in chosen if fit.axis == axis for size in fit.sizes])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, title="slope of log ms", title_fontsize=7, loc="upper left")
    figure.suptitle(f"Growth: forward + backward, {dtype}, p={p:g}, around {_size(common)}")
    return figure


def _size(point: Mapping[str, int]) -> str:
    return "{m}x{n}x{k} r={r}".format_map(point)


def _legend_order(fit: Fit) -> int:
    return list(COLORS).index(fit.provider)


def _plain_numbers(axis: Axis) -> None:
    """Give a log scale plain numbers, at 1, 2 and 5."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _size_axis(axes: Axes, axis: str, sizes: Iterable[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_formatter(NullFormatter())
    ticks = sorted(set(sizes))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel(AXES[axis])


def roofline(rows: Sequence[Any], dtype: str, ceilings: dict[str, Any]) -> Figure:
    """Draw the rate of each call against its FLOPs a byte, under the measured ceilings."""
    bandwidth, rate = ceilings["bytes_per_second"], ceilings["flops_per_second"][dtype]
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    axes = figure.subplots()
    intensities = [row.flops / row.floor_bytes for row in rows]
    ends = min(intensities) / 1.5, max(intensities) * 1.5
    knee = rate / bandwidth
    x = sorted({ends[0], ends[1], min(max(knee, ends[0]), ends[1])})
    roof = [min(rate, at * bandwidth) / 1e9 for at in x]
    axes.plot(x, roof, color="black", linewidth=1, label="measured ceilings")
    for provider, group in by_provider(rows):
        at = [row.flops / row.floor_bytes for row in group]
        reached = [row.flops / row.ms.median / 1e6 for row in group]
        axes.plot(
            at, reached, MARKERS[provider], color=COLORS[provider], markersize=4, alpha=0.8,
            label=label(provider),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("FLOPs of the formulas a byte that must be moved")
    axes.set_ylabel("GFLOP/s reached")
    copy, product = f"{bandwidth / 1e9:.0f} GB/s", f"{rate / 1e9:,.0f} GFLOP/s"
    axes.set_title(f"Roofline, {dtype}: measured copy {copy}, product {product}")
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return figure


def memory(rows: Sequence[Any]) -> Figure:
    """Draw what each provider saves for backward beyond x, in units of x."""
    figure, [axes] = _panels(rows, _memory_group, 1)
    values = [(_memory_group(row), row.provider, row.saved_bytes / row.x_bytes) for row in rows]
    _draw(axes, values, COLORS, "{:.3g}")
    axes.set_xlabel("bytes kept for backward beyond x and the parameters, in units of x's bytes")
    axes.set_title("Memory kept for backward")
    legend_below(figure, axes)
    return figure


def _memory_group(row: Any) -> str:
    case, layers = row.case, len(row.widths)
    adapters = "" if case.adapters == case.dtype else f", {case.adapters} adapters"
    what = f"{case.model}, {layers} layers of one x" if layers > 1 else f"{case.model}, one layer"
    return f"{what}\nM={case.m} K={case.k} p={case.p:g}\n{case.dtype}{adapters}{how_kept(case)}"


def step(rows: Sequence[Any]) -> Figure:
    """Draw the time of a training step over PEFT's, and the memory that it adds."""
    figure, panels = _panels(rows, _step_group, 2)
    ratios = [
        (_step_group(row), row.provider, row.over_peft.median if row.over_peft else 1.0)
        for row in rows
    ]
    _draw(panels[0], ratios, COLORS, "{:.2f}")
    panels[0].set_xlabel("time of a step / PEFT's")
    peaks = [(_step_group(row), row.provider, row.peak_bytes / MIB) for row in rows]
    _draw(panels[1], peaks, COLORS, "{:.0f}")
    panels[1].set_xlabel("peak memory that a step adds, MiB")
    figure.suptitle(f"Training step of a Llama-style model ({_sizes(rows[0].case.sizes)})")
    legend_below(figure, panels[0])
    return figure


def _sizes(sizes: Any) -> str:
    return f"{sizes.layers} layers, hidden {sizes.hidden}, batch {sizes.batch}x{sizes.length}"


def _step_group(row: Any) -> str:
    case = row.case
    adapters = "" if case.adapters == case.dtype else f"\n{case.adapters} adapters"
    return f"{case.dtype} p={case.p:g}{adapters}{how_kept(case)}"


def kernels(rows: Sequence[Any]) -> Figure:
    """Draw instructions and bytes over the plain product's: counted, not measured."""
    plain = {_kernel_group(row): row.counts for row in rows if row.what == "plain product"}
    best: dict[tuple[str, str], Any] = {}
    for row in sorted(rows, key=lambda row: row.predicted_us):
        best.setdefault((_kernel_group(row), row.what), row)
    chosen = sorted(best.values(), key=rows.index)
    figure, panels = _panels(chosen, _kernel_group, 2)
    counts = {"instructions": "instructions", "unique_bytes": "bytes touched"}
    for axes, (field, what) in zip(panels, counts.items(), strict=True):
        values = [
            (group, row.what, getattr(row.counts, field) / getattr(plain[group], field))
            for row in chosen
            for group in [_kernel_group(row)]
        ]
        _draw(axes, values, KERNEL_COLORS, "{:.2f}")
        axes.set_xlabel(f"{what} / the plain product's")
    m, n, k, r = rows[0].size
    figure.suptitle(f"Counted in a PTX virtual machine, not measured: bf16 {m}x{n}x{k} r={r}")
    legend_below(figure, panels[0])
    return figure


def _kernel_group(row: Any) -> str:
    return f"sm_{row.arch} {row.direction}\np={'0.1' if row.dropout else '0'}"


def _panels(rows: Sequence[Any], group_of: Any, count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure high enough for the bars of rows, and its panels side by side."""
    groups = len({group_of(row) for row in rows})
    # Padded, or long labels touch the edge.
    layout = ConstrainedLayoutEngine(w_pad=0.1)
    figure = Figure(figsize=(WIDTH, 1.8 + 0.17 * (len(rows) + groups)), layout=layout)
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _draw(axes: Axes, bars: Bars, colors: dict[str, str], number: str) -> None:
    """Draw a group of horizontal bars for each group, a bar for each series, and its number."""
    bars = list(bars)
    groups = list(dict.fromkeys(group for group, _, _ in bars))
    series = sorted({name for _, name, _ in bars}, key=list(colors).index)
    height = ROOM / len(series)
    for index, name in enumerate(series):
        own = [(groups.index(group), value) for group, other, value in bars if other == name]
        at = [place - ROOM / 2 + (index + 0.5) * height for place, _ in own]
        widths = [value for _, value in own]
        drawn = axes.barh(at, widths, height * 0.9, color=colors[name], label=label(name))
        axes.bar_label(drawn, [number.format(width) for width in widths], fontsize=6, padding=2)
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def by_provider(rows: Iterable[Any]) -> list[tuple[str, list[Any]]]:
    """Return the rows of each provider, in the order of the colours."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row.provider, []).append(row)
    return sorted(found.items(), key=lambda item: list(COLORS).index(item[0]))


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """Put the legend of one panel under the figure."""
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8
    )

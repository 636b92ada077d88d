"""The memory suite: what layers keep for backward and allocate, with and without dropout.

Counted, not timed. The projections q, k and v of an attention share one x, which frameworks save
once for each of them, as what dropout or a cast has made of it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.measure.correctness import RIGHT, WRONG, verdicts
from bench.measure.footprint import MIB, peak_bytes, saved_bytes
from bench.measure.session import Session
from bench.providers.calls import inputs_for
from bench.providers.registry import BY_NAME, peft_layer
from bench.shapes import DTYPES, MODELS, QLORA, TARGETS, Case, Grid, Shape

SHARING = ("q", "k", "v")
LIMIT = 0.02  # of x's bytes, for one layer


class Group(NamedTuple):
    """Layers of a model that share x: a case whose N is that of the first, and every N."""

    case: Case
    widths: tuple[int, ...]


@dataclass(frozen=True)
class MemoryRow:
    """A provider's memory for layers that share x; no figures where it is wrong.

    saved_bytes: kept for backward beyond x and the parameters. limit: what the project allows of
    saved_bytes over x_bytes.
    """

    case: Case
    widths: tuple[int, ...]
    provider: str
    reason: str = ""
    x_bytes: int = 0
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    limit: float | None = None

    LINE = "  {:<28}{:>10}{:>12}{:>12}{:>12}{:>8}"
    HEADER = LINE.format("", "x MiB", "saved MiB", "saved / x", "peak MiB", "limit")

    def __str__(self) -> str:
        label = BY_NAME[self.provider].label if self.provider in BY_NAME else self.provider
        if self.saved_bytes is None or self.peak_bytes is None:
            return f"  {label:<28}{self.reason}"
        return self.LINE.format(
            label,
            f"{self.x_bytes / MIB:.2f}",
            f"{self.saved_bytes / MIB:.3f}",
            f"{self.saved_bytes / self.x_bytes:.3f}",
            f"{self.peak_bytes / MIB:.2f}",
            "-" if self.limit is None else f"<={self.limit:.2f}",
        )


def groups(names: Iterable[str], grid: Grid) -> Iterator[Group]:
    """Yield what shape names stand for: a model's q, k and v; of others than models one layer."""
    for name in names:
        if name == TARGETS:
            for dtype, p in product(("bf16", "fp32"), (0.05, 0.0)):
                yield Group(Case(TARGETS, "square", 512, 2048, 2048, 16, dtype, dtype, p), (2048,))
        elif name == QLORA:
            for dtype, p in product(grid.dtypes, grid.dropouts):
                sizes = (QLORA, "square", 512, 4096, 4096, 16, dtype, grid.adapters)
                yield Group(Case(*sizes, p, base="nf4"), (4096,))
        elif name in MODELS and (sharing := _sharing(MODELS[name])):
            n, k = sharing[0]
            for dtype, m, r, p in product(grid.dtypes, grid.tokens, grid.ranks, grid.dropouts):
                case = Case(name, "+".join(SHARING), m, n, k, r, dtype, grid.adapters, p)
                yield Group(case, tuple(shape.n for shape in sharing))


def _sharing(projections: dict[str, Shape]) -> list[Shape]:
    return [s for name, s in projections.items() for part in name.split("+") if part in SHARING]


def measure(group: Group, session: Session) -> list[MemoryRow]:
    """Check every provider on the group's first layer, then count the memory of all."""
    case, widths = group
    x_bytes = case.m * case.k * DTYPES[case.dtype].itemsize
    limited = LIMIT if case.model == TARGETS else None
    rows = []
    for name, (state, reason) in verdicts(case, session.providers, session.device).items():
        if state == RIGHT:
            saved, peak = session.probe.run(of_group, group, name, session.device)
            limit = limited if BY_NAME[name].ours else None
            rows.append(MemoryRow(case, widths, name, "", x_bytes, saved, peak, limit))
        elif state == WRONG:
            rows.append(MemoryRow(case, widths, name, f"{WRONG}: {reason}"))
    return rows


class _Sharing(nn.ModuleList):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self]


def of_group(group: Group, name: str, device: str) -> tuple[int, int]:
    """Return the bytes saved and allocated by a forward and backward in this process."""
    case, provider = group.case, BY_NAME[name]
    torch.compiler.reset()
    torch.manual_seed(0)
    layers, gradients = _Sharing(), []
    for width in group.widths:
        sized = replace(case, n=width)
        inputs = inputs_for(provider, sized.inputs(device))
        made = peft_layer(sized, inputs, case.p, provider.codes)
        layers.append(provider.convert(made).train())
        gradients.append(inputs.dy)
    x = inputs.x.requires_grad_()
    leaves = [x, *(p for p in layers.parameters() if p.requires_grad)]

    def call() -> None:
        torch.autograd.backward(layers(x), gradients)

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    call()
    clear()
    saved = saved_bytes(lambda: layers(x), [x], layers)
    return saved, peak_bytes(call, device)

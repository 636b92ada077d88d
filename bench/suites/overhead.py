"""The overhead suite: what a call costs beside its products, and what a dropout mask costs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import lora_kernels as lk
from bench.measure.correctness import RIGHT, WRONG, verdicts
from bench.measure.session import Session
from bench.measure.timing import Meter, Spread, threads
from bench.providers.calls import Call, inputs_for
from bench.providers.registry import BY_NAME, REFERENCE, Provider
from bench.shapes import SCALING, Case
from lora_kernels.native import absence

# Too small to take time: what is left is the cost of the call.
TINY = Case("overhead", "tiny", 1, 64, 64, 16, "fp32", "fp32", 0.0)
CALLS = 100  # in one timing
NO_GRAD, GRAD, TRAIN = "no grad", "grad", "forward + backward"
# 15 and 20 µs where PEFT takes 35.
FUNCTION = "lora_linear"
LIMITS = {FUNCTION: 15 / 35, "cpu": 20 / 35}
MASK_SIZE, MASK_LIMIT = 2048, 0.1
in_this_thread = partial(torch.autograd.set_multithreading_enabled, False)


@dataclass(frozen=True)
class OverheadRow:
    """A tiny call by one way of calling it; no times where it is wrong."""

    call: str
    mode: str
    reason: str = ""
    us: float | None = None
    over_peft: Spread | None = None
    limit: float | None = None

    LINE = "  {:<28}{:<20}{:>8}{:>19}{:>7}"
    HEADER = LINE.format("1x64x64", "", "µs", "/ PEFT", "limit")

    def __str__(self) -> str:
        label = BY_NAME[self.call].label if self.call in BY_NAME else self.call
        if self.us is None:
            return f"  {label:<28}{self.mode:<20}{self.reason}"
        limit = "-" if self.limit is None else f"<={self.limit:.2f}"
        return self.LINE.format(label, self.mode, f"{self.us:.1f}", str(self.over_peft), limit)


@dataclass(frozen=True)
class MaskRow:
    """The keep mask of a 2048 x 2048 activation, by the compiled generator, beside F.dropout."""

    threads: int
    ns: float  # an element
    over_dropout: Spread
    limit: float = MASK_LIMIT

    LINE = "  {:<26}{:>14}{:>19}{:>7}"
    HEADER = LINE.format("mask 2048x2048", "ns an element", "/ F.dropout", "limit")

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        ratio, limit = str(self.over_dropout), f"<={self.limit:.2f}"
        return self.LINE.format(threads, f"{self.ns:.3f}", ratio, limit)


def measure(session: Session) -> Iterator[OverheadRow]:
    """Time tiny calls by every provider that makes them eagerly, and by the function itself.

    The clock is one thread's CPU time: a call's own cost is that of the thread that makes it, in
    which a GPU's backward runs here, too.
    """
    providers, device = session.providers, session.device
    tiny = replace(TINY, dtype="bf16") if device == "cuda" else TINY
    states = verdicts(tiny, providers, device)
    yield from (
        OverheadRow(name, "", reason) for name, (state, reason) in states.items() if state == WRONG
    )
    right = [p for p in providers if states[p.name][0] == RIGHT and not p.compiles]
    for mode in (NO_GRAD, GRAD, TRAIN):
        calls = _calls(tiny, right, device, mode)
        with torch.set_grad_enabled(mode != NO_GRAD), threads(1), in_this_thread():
            times, _ = Meter(session.seconds).rounds(
                [[partial(_repeat, call) for call in calls.values()]]
            )
        columns = dict(zip(calls, zip(*times, strict=True), strict=True))
        for name, column in columns.items():
            us, ratio = 1e3 * Spread.of(column).median / CALLS, (column, columns[REFERENCE])
            limit = None if mode == TRAIN else LIMITS.get(name)
            yield OverheadRow(name, mode, "", us, Spread.of_ratios(*ratio), limit)


def _calls(
    tiny: Case, providers: Sequence[Provider], device: str, mode: str
) -> dict[str, Callable[[], Any]]:
    inputs = tiny.inputs(device)
    made = {p.name: Call(p, tiny, inputs_for(p, inputs), 0.0) for p in providers}
    if mode == TRAIN:
        return dict(made)
    x, *adapters = made[REFERENCE].leaves
    forwards: dict[str, Callable[[], Any]] = {
        name: partial(call.layer, call.x) for name, call in made.items()
    }
    function = partial(lk.lora_linear, x, inputs.weight, *adapters, scaling=SCALING)
    return {**forwards, FUNCTION: function}


def _repeat(call: Callable[[], Any]) -> None:
    for _ in range(CALLS):
        call()


def measure_masks(most_threads: int, session: Session) -> Iterator[MaskRow]:
    """Time the compiled mask and torch's own dropout by one thread, then by more."""
    if absence("cpu") is not None:
        return
    x = torch.randn(MASK_SIZE, MASK_SIZE)
    lanes = torch.empty(x.numel() // 8, 8, dtype=torch.int16)
    ours = partial(torch.ops.lora_kernels.keep_lanes_.default, lanes, 0, 5, 3277)
    for count in range(1, most_threads + 1):
        with threads(count):
            times, _ = Meter(session.seconds).rounds(
                [[partial(nn.functional.dropout, x, 0.05), ours]]
            )
        dropout, mask = zip(*times, strict=True)
        ns = 1e6 * Spread.of(mask).median / x.numel()
        yield MaskRow(count, ns, Spread.of_ratios(mask, dropout))

"""The layer suite: one adapted layer, forward and backward, by every provider.

Calls of all providers are interleaved, on tensors that rotate through more than the last cache
holds; ratios are formed within each round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.measure.correctness import RIGHT, WRONG, verdicts
from bench.measure.footprint import MIB, Footprint, footprint
from bench.measure.session import Session
from bench.measure.timing import BUSY, MIN_ROUNDS, TIMED, Spread, compared
from bench.providers.calls import make_slots
from bench.providers.registry import BY_NAME, FLOOR, Provider
from bench.shapes import DENSE, Case, floor_bytes, flops

# Tensors rotated: twice the last cache, in at least two sets, and at most so many.
CACHES, MAX_SLOTS = 2, 32


@dataclass(frozen=True)
class Row:
    """One provider's figures on one case; no times unless `state` is "timed".

    reason: why it isn't timed. over_peft, over_base: ratios of times, formed round by round; on a
    quantised weight PEFT is that over bitsandbytes.
    flops, floor_bytes: of the formulas, each tensor moved once a pass. roofline: the least time
    that the measured ceilings allow for them, over the time taken. limit: for over_peft.
    """

    case: Case
    provider: str
    state: str
    reason: str
    flops: int
    floor_bytes: int
    slots: int = 0
    rounds: int = 0
    rejected: int = 0
    ms: Spread | None = None
    over_peft: Spread | None = None
    over_base: Spread | None = None
    roofline: float | None = None
    footprint: Footprint | None = None
    limit: float | None = None

    LINE = "  {:<26}{:>10}{:>15}{:>19}{:>19}{:>6}{:>5}{:>9}{:>10}{:>7}"
    HEADER = LINE.format(
        "", "ms", "quartiles", "/ PEFT", "/ base", "roof", "ops", "peak MiB", "saved MiB", "limit"
    )

    def __str__(self) -> str:
        label = BY_NAME[self.provider].label if self.provider in BY_NAME else self.provider
        if self.ms is None:
            return f"  {label:<26}{self.state}: {self.reason}"
        counts = ["-"] * 3
        if self.footprint is not None:
            sizes = (self.footprint.peak_bytes, self.footprint.saved_bytes)
            counts = [_or_dash(self.footprint.launches), *(f"{size / MIB:.2f}" for size in sizes)]
        return self.LINE.format(
            label,
            f"{self.ms.median:.3f}",
            f"{self.ms.low:.3f}-{self.ms.high:.3f}",
            _or_dash(self.over_peft),
            _or_dash(self.over_base),
            "-" if self.roofline is None else f"{self.roofline:.0%}",
            *counts,
            "-" if self.limit is None else f"<={self.limit:.2f}",
        )


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


def measure(case: Case, session: Session) -> list[Row]:
    """Check every provider on a case, time those that are right, and count what they cost."""
    torch.manual_seed(0)
    if any(provider.compiles for provider in session.providers):
        torch.compiler.reset()  # one compilation a case, as a model's own shapes would have
    states = verdicts(case, session.providers, session.device)
    slots = slot_count(case, session.cache_bytes)
    calls = _prepared(case, session, states, slots)
    times, rejected = session.layer_clock.rounds(list(zip(*calls.values(), strict=True)))
    columns = dict(zip(calls, zip(*times, strict=True), strict=False))
    rows = []
    for provider in session.providers:
        name, (state, reason) = provider.name, states[provider.name]
        formulas = _formulas(case, provider)
        fields: dict[str, Any] = {"flops": flops(formulas), "floor_bytes": floor_bytes(formulas)}
        if state == RIGHT:
            fields |= {"slots": slots, "rounds": len(times), "rejected": rejected}
            if len(times) >= MIN_ROUNDS:
                state, fields = TIMED, fields | _figures(case, provider, columns, session)
            else:
                state, reason = BUSY, f"{len(times)} quiet rounds of {len(times) + rejected}"
        rows.append(Row(case, name, state, reason, **fields))
    return rows


def _prepared(
    case: Case, session: Session, states: dict[str, tuple[str, str]], slots: int
) -> dict[str, list[Callable[[], Any]]]:
    """Return each right provider's calls, one a slot; one that can't be prepared isn't right."""
    right = [p for p in session.providers if states[p.name][0] == RIGHT]
    made = zip(*make_slots(right, case, session.device, slots), strict=True)
    prepared = {}
    for provider, calls in zip(right, made, strict=True):
        try:
            prepared[provider.name] = [session.layer_clock.prepare(call) for call in calls]
        except RuntimeError as error:
            states[provider.name] = WRONG, f"can't be captured: {error}; try --timer events"
    return prepared


def _figures(
    case: Case, provider: Provider, columns: Mapping[str, Sequence[float]], session: Session
) -> dict[str, Any]:
    name = provider.name
    ms = Spread.of(columns[name])
    return {
        "ms": ms,
        "over_peft": compared(columns, name, case.reference),
        "over_base": compared(columns, name, FLOOR),
        "roofline": 1e3 * session.ceilings.seconds(_formulas(case, provider)) / ms.median,
        "footprint": session.probe.run(footprint, case, name, session.device),
        "limit": dict(case.limits).get(name),
    }


def _formulas(case: Case, provider: Provider) -> Case:
    """Return the case as what a provider computes of it is counted."""
    base = case.base if provider.codes else DENSE
    return replace(case, r=0 if provider.single_product else case.r, base=base)


def slot_count(case: Case, cache_bytes: int) -> int:
    """Return how many sets of tensors to rotate, so that they don't stay in cache."""
    return max(2, min(MAX_SLOTS, -(-CACHES * cache_bytes // floor_bytes(case))))

"""What became of an adapted layer's calls: how many were fused, how many left, and why."""

import logging
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_LOGGER = logging.getLogger("lora_kernels")
# States that a user asks for; leaving in them is no surprise.
_ASKED_FOR = ("adapters disabled", "merged", "no active adapter")


class Calls:
    """A layer's calls so far; calls inside compiled graphs aren't seen.

    fused, left: how many calls were fused, and how many took the unfused forward.
    reason: why the last call that was left was.
    lost: why packed copies of the weight are gone, where they are.
    repack: which copies to make again on unmerging: for both directions, or forward only.
    path: the layer's, in the model that was patched.
    told: reasons that were logged, shared by the layers patched together.
    """

    __slots__ = ("fused", "left", "lost", "path", "reason", "repack", "told")

    def __init__(self, path: str = "", told: set[str] | None = None) -> None:
        self.path = path
        self.fused, self.left = 0, 0
        self.reason: str | None = None
        self.lost: str | None = None
        self.repack: bool | None = None
        self.told: set[str] = set() if told is None else told

    def leave(self, reason: str) -> None:
        """Count a call that isn't fused, and log each reason once."""
        self.left += 1
        self.reason = reason
        if reason not in self.told and not reason.startswith(_ASKED_FOR):
            self.told.add(reason)
            _LOGGER.warning(
                "a patched layer isn't fused: %s (lora_kernels.report(model) names the layers)",
                reason,
            )


@dataclass(frozen=True)
class LayerUse:
    """One layer of a `UsageReport`.

    Attributes:
        fused: calls so far that were fused.
        left: calls so far that weren't.
        state: why a call would be left now, by the layer itself; None where it would be fused.
        reason: why the last call that was left was.
        packed: "packed", "lost: ..." where packed copies are gone, or None where there were none.

    Example:
        >>> layer = lk.LoRALinear(8, 8)
        >>> layer.merge()
        >>> lk.report(layer).layers[""].state
        'merged'
    """

    fused: int
    left: int
    state: str | None
    reason: str | None
    packed: str | None


@dataclass(frozen=True)
class UsageReport:
    """What `report` found: adapted layers by path; `print` shows it, grouped by reason.

    Attributes:
        layers: what became of each layer's calls, by its path.

    Example:
        >>> use = lk.LayerUse(fused=8, left=2, state=None, reason="merged", packed=None)
        >>> print(lk.UsageReport({"q_proj": use}))
        lora_kernels: 1 of 1 LoRA layers fused now; calls so far: 8 fused, 2 left
          last left (merged): q_proj
    """

    layers: dict[str, LayerUse] = field(default_factory=dict)

    def __str__(self) -> str:
        used = self.layers.values()
        fused, left = sum(use.fused for use in used), sum(use.left for use in used)
        now = sum(use.state is None for use in used)
        lines = [
            f"lora_kernels: {now} of {len(self.layers)} LoRA layers fused now; "
            f"calls so far: {fused} fused, {left} left"
        ]
        lines += grouped("not fused now", {p: u.state for p, u in self.layers.items() if u.state})
        lines += grouped("last left", {p: u.reason for p, u in self.layers.items() if u.reason})
        packed = {path: use.packed for path, use in self.layers.items() if use.packed}
        return "\n".join(lines + grouped("weight copies", packed))


def grouped(what: str, reasons: dict[str, Any]) -> list[str]:
    """Return a line for each reason, with the first three paths that have it."""
    paths: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        paths.setdefault(reason, []).append(path)
    lines = []
    for reason, found in paths.items():
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        lines.append(f"  {what} ({reason}): {', '.join(found[:3])}{more}")
    return lines


def use_of(layer: nn.Module, state: str | None) -> LayerUse:
    """Return what a layer's own record says; `state` as in `LayerUse`."""
    calls = vars(layer).get("_lora_kernels_calls") or Calls()
    packed = "packed" if getattr(layer, "_lora_kernels_packed", None) else None
    if packed is None and calls.lost is not None:
        packed = f"lost: {calls.lost}"
    return LayerUse(calls.fused, calls.left, state, calls.reason, packed)

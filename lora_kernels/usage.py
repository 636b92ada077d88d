"""What became of an adapted layer's calls: how many were fused, how many left, and why."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from lora_kernels.operands.held import Recipe
from lora_kernels.summary import Group, Summary, grouped

LOGGER = logging.getLogger("lora_kernels")
# States that a user asks for; leaving in them is no surprise.
_ASKED_FOR = ("adapters disabled", "merged", "no active adapter")


class Calls:
    """A layer's calls so far; calls inside compiled graphs aren't seen.

    fused, left: how many calls were fused, and how many took the unfused forward.
    reason: why the last call that was left was.
    lost: why copies of the weight are gone, where they are.
    recipe: how copies of the weight are made again on unmerging, if they are.
    autocast: the dtype that autocast last asked for, if it did.
    path: the layer's, in the model that was patched.
    told: reasons that were logged, shared by the layers patched together.
    """

    __slots__ = ("autocast", "fused", "left", "lost", "path", "reason", "recipe", "told")

    def __init__(self, path: str = "", told: set[str] | None = None) -> None:
        self.path = path
        self.fused, self.left = 0, 0
        self.reason: str | None = None
        self.lost: str | None = None
        self.recipe: Recipe | None = None
        self.autocast: torch.dtype | None = None
        self.told: set[str] = set() if told is None else told

    def leave(self, reason: str) -> None:
        """Count a call that isn't fused, and log each reason once."""
        self.left += 1
        self.reason = reason
        if reason not in self.told and not reason.startswith(_ASKED_FOR):
            self.told.add(reason)
            LOGGER.warning(
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
        packed: copies of the weight that the layer holds: "packed", "cast to ...", "lost: ..."
            where they are gone, "unused: ..." where calls read the weight itself, "none: ..." where
            each call under autocast casts a float32 weight, or None.
        impl: what a call that is fused now runs by, such as "cpu (avx2)", in the weights' dtype or
            that of an autocast around `report`; None where it isn't fused, or where the weight
            doesn't say.
        without_kernel: why that is none of the package's kernels.

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
    impl: str | None = None
    without_kernel: str | None = None


@dataclass(frozen=True)
class UsageReport(Summary):
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

    def _headline(self) -> str:
        used = self.layers.values()
        fused, left = sum(use.fused for use in used), sum(use.left for use in used)
        now = sum(use.state is None for use in used)
        by = run_by(use.impl for use in used if use.impl)
        return (
            f"lora_kernels: {now} of {len(self.layers)} LoRA layers fused now{by and f', {by}'}; "
            f"calls so far: {fused} fused, {left} left"
        )

    def _groups(self) -> list[Group]:
        used = self.layers.items()
        impls = {path: use.impl for path, use in used if use.impl}
        without = {path: use.without_kernel for path, use in used if use.without_kernel}
        return [
            *by_implementation(impls, without),
            *grouped("not fused now", {path: use.state for path, use in used if use.state}),
            *grouped("last left", {path: use.reason for path, use in used if use.reason}),
            *grouped("weight copies", {path: use.packed for path, use in used if use.packed}),
        ]


def run_by(impls: Iterable[str]) -> str:
    """Return the part of a headline that names the implementations, each once; "" without any."""
    counts = Counter(impls)
    each = (f"{name} in {count}" if len(counts) > 1 else name for name, count in counts.items())
    return f"run by {', '.join(each)}" if counts else ""


def by_implementation(impls: dict[str, str], without_kernel: dict[str, str]) -> list[Group]:
    """Return a group for each implementation, and reason why it is none of the kernels."""
    pairs = {path: (impl, without_kernel.get(path)) for path, impl in impls.items()}
    distinct = list(dict.fromkeys(pairs.values()))
    return [
        Group(
            f"run by {impl}",
            reason,
            [path for path in pairs if pairs[path] == (impl, reason)],
            in_headline=reason is None and len(distinct) == 1,
        )
        for impl, reason in distinct
    ]

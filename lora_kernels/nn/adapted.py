"""What adapted layers have in common."""

import math

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from lora_kernels import merging
from lora_kernels.merging import Update
from lora_kernels.usage import Calls


class Adapted(nn.Module):
    """A frozen `base_layer` whose weight can hold the adapter's update."""

    base_layer: nn.Module
    r: int
    lora_alpha: float
    use_rslora: bool
    impl: str
    _merged_updates: tuple[Update, ...] = ()
    _lora_kernels_op: str
    _lora_kernels_calls: Calls

    @property
    def scaling(self) -> float:
        """The factor on the adapter branch."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the adapter's update."""
        return bool(self._merged_updates)

    @torch.no_grad()
    def merge(self) -> None:
        """Add scaling · B A to the base layer's weight; a second call changes nothing.

        DoRA rescales the rows of the sum, by the length that they have without other adapters.

        `base_layer.weight` becomes another parameter, so that an embedding tied to it keeps its
        own; a sharded one is written in place. The layer keeps its own weight until `unmerge`.
        Several adapters on one base layer may be merged and unmerged in any order.
        Precision: the sum is formed in float32 (float64 for float64) and rounded once.

        Raises:
            TypeError, ValueError: a weight is computed (parametrised, pruned), quantised, emptied
                or on meta, a submodule has a forward of its own, or a convolution has groups.
                Nothing was changed.

        Example:
            >>> layer, x = lk.LoRALinear(4, 4), torch.ones(1, 4)
            >>> y = layer(x)
            >>> layer.merge()
            >>> torch.allclose(layer(x), y), layer.merged
            (True, True)
        """
        if not self.merged:
            updates = self._updates()
            merging.merge(self.base_layer, *updates)
            self._merged_updates = updates

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take back what `merge` added; without a merge nothing changes.

        The base layer gets its own weight back, bit for bit; if somebody wrote to it meanwhile,
        what was added is subtracted.

        Raises:
            TypeError, ValueError: as `merge`, or `base_layer` isn't the layer that was merged into.

        Example:
            >>> layer = lk.LoRALinear(4, 4)
            >>> before = layer.base_layer.weight.clone()
            >>> layer.merge()
            >>> layer.unmerge()
            >>> torch.equal(layer.base_layer.weight, before)
            True
        """
        merging.unmerge(self.base_layer, *self._merged_updates)
        self._merged_updates = ()

    def left_reason(self) -> str | None:
        """Return why a call would be composed of the submodules' own; None where it is fused."""
        raise NotImplementedError

    def _note(self, reason: str | None) -> None:
        """Count a call that is fused, or left for a reason."""
        # A counter would be one of the things that a compiled graph depends on.
        if is_dynamo_compiling():
            return
        if reason is None:
            self._lora_kernels_calls.fused += 1
        else:
            self._lora_kernels_calls.leave(reason)

    def _updates(self) -> tuple[Update, ...]:
        """Return what is merged, of tensors that nobody else writes to."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Say what the adapter's settings are, and its state."""
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, use_rslora={self.use_rslora}, "
            f"scaling={self.scaling:g}, merged={self.merged}, impl={self.impl!r}"
        )

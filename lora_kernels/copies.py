"""The copies of its frozen weight that an adapted layer holds, packed or cast: read, dropped, made.

A layer has them in `_lora_kernels_packed`; its record of calls keeps why they are gone.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from lora_kernels.casting import reason_uncast
from lora_kernels.operands.held import CastWeight, Recipe
from lora_kernels.operands.onednn import OnednnWeight
from lora_kernels.operands.weight import Dense, Weight
from lora_kernels.prepack import reason_left

Copies = OnednnWeight | CastWeight
_count_dispatch_modes = torch._C._len_torch_dispatch_stack


class HoldingLayer(Protocol):
    """A layer that may hold copies of its weight."""

    _lora_kernels_packed: Copies | None


def current(layer: HoldingLayer, weight: Tensor) -> Weight:
    """Return a layer's weight as a call takes it: with its copies while they are of `weight`."""
    # Another thread may be unpatching the layer.
    held = getattr(layer, "_lora_kernels_packed", None)
    # Opaque tensors and versions can't be traced: graphs take the weight itself, make_fx's too.
    if held is None or torch.compiler.is_compiling() or _count_dispatch_modes():
        return Dense(weight)
    if held.holds(weight):
        return held
    forget(layer, _changed(held))
    return Dense(weight)


def forget(layer: HoldingLayer, reason: str, until_unmerged: bool = False) -> None:
    """Drop the layer's copies, if it holds any; its record keeps the reason."""
    held = getattr(layer, "_lora_kernels_packed", None)
    if held is None:
        return
    layer._lora_kernels_packed = None
    calls = vars(layer).get("_lora_kernels_calls")
    if calls is not None:
        calls.lost, calls.recipe = reason, _recipe(held) if until_unmerged else None


def restore(layer: Any, weight: Tensor | str) -> None:
    """Make the copies again that `forget` dropped until now, or say why they can't be."""
    calls = vars(layer).get("_lora_kernels_calls")
    if calls is None or calls.recipe is None:
        return
    recipe, calls.recipe = calls.recipe, None
    made = weight if isinstance(weight, str) else _made(weight, recipe)
    calls.lost = made if isinstance(made, str) else None
    if not isinstance(made, str):
        layer._lora_kernels_packed = made


def state_of_copies(layer: Any, weight: Tensor | None, impl: str | None) -> str | None:
    """Return what copies of its weight a layer holds, or has lost, or lacks; None if nothing.

    weight: the base layer's as a call reads it, if one can. impl: what its calls run by, where that
    is known.
    """
    held = getattr(layer, "_lora_kernels_packed", None)
    calls = vars(layer).get("_lora_kernels_calls")
    if held is None:
        if calls is None or calls.lost is None:
            return _cast_each_time(calls, weight)
        return f"lost: {calls.lost}"
    if weight is None or not held.holds(weight):
        return f"lost: {_changed(held)}"
    if isinstance(held, CastWeight):
        return _state_of_cast(held, calls)
    if held.unused is not None:
        name, dtype = held.unused
        return f"unused: the last call ran by {name} in {dtype}, the copies are {held.dtype}"
    if impl is not None and not impl.startswith("cpu"):
        return f"unused: calls run by {impl}"
    return "packed"


def _changed(held: Copies) -> str:
    made_by = "cast_weights_" if isinstance(held, CastWeight) else "prepack_"
    return f"the weight was replaced, moved or changed; call {made_by} again"


def _cast_each_time(calls: Any, weight: Tensor | None) -> str | None:
    """Return that calls under autocast cast a float32 weight, and what to do, where they do."""
    dtype = getattr(calls, "autocast", None)
    if weight is None or dtype in (None, torch.float32) or reason_uncast(weight) is not None:
        return None
    return (
        f"none: each call under autocast casts the float32 weight; load the model with "
        f"dtype={dtype}, or call lora_kernels.cast_weights_(model, {dtype})"
    )


def _state_of_cast(held: CastWeight, calls: Any) -> str:
    dtype, asked = held.copy.dtype, getattr(calls, "autocast", None)
    if asked is not None and asked != dtype:
        return f"unused: the last autocast was to {asked}, the copy is {dtype}"
    return f"cast to {dtype}{'' if held.packed is None else ', packed'}"


def _recipe(held: Copies) -> Recipe:
    if isinstance(held, OnednnWeight):
        return Recipe(None, held.both_ways)
    packed = held.packed
    return Recipe(held.copy.dtype, packed.both_ways if isinstance(packed, OnednnWeight) else None)


def _made(weight: Tensor, recipe: Recipe) -> Copies | str:
    """Return copies of a weight, or why there are none."""
    if recipe.cast is None:
        return reason_left(weight) or OnednnWeight(weight, bool(recipe.pack))
    reason = reason_uncast(weight)
    if reason is not None:
        return reason
    held = CastWeight(weight, recipe.cast)
    if recipe.pack is not None and reason_left(held.copy) is None:
        held.packed = OnednnWeight(held.copy, recipe.pack)
    return held

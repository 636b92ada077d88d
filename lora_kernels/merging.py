"""What adapters have merged into a base layer: its own weight, and the update of each.

The base layer holds their sum while any is merged and its own weight again afterwards, in whatever
order several adapters on one layer come and go.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_kernels.checks import FLOAT_DTYPES, check_memory, is_dtensor

# What a weight may be merged into: layers whose forward is their class's, and W's dimensions.
_KINDS: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Embedding: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
}
# By the parameter's name, in the base layer's __dict__: copied and pickled with it.
_RECORDS = "_lora_kernels_merged"


class Update(NamedTuple):
    """An adapter's scaling · B A, and what DoRA multiplies the rows of the sum by.

    A and B are matrices; of W [N, ...] their product is viewed as [N, ...]. Of experts' W they have
    an expert in front, as it has. parameter: W's name.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    gain: Tensor | None = None
    parameter: str = "weight"


class _Record(NamedTuple):
    own: Tensor
    updates: tuple[Update, ...]


class _Change(NamedTuple):
    """What a parameter gets: a record, and the sum that it says."""

    weight: Tensor
    record: _Record
    value: Tensor


def with_updates(weight: Tensor, *updates: Update, sign: int = 1) -> Tensor:
    """Return weight ± Σ scaling · B A, summed in float32 (float64 for float64), rounded once.

    Rows are multiplied by each update's gain, if it has one, after its sum; with sign -1 what that
    made is taken apart again, the last update first.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    device, total = weight.device, weight.to(wide)
    for a, b, scaling, gain, _ in updates[::sign]:
        factors = b.to(device, wide), a.to(device, wide)
        rows = None if gain is None else gain.to(device, wide)[:, None]
        if rows is not None and sign < 0:
            total = total / rows
        if a.ndim == 3:
            total = torch.baddbmm(total, *factors, alpha=sign * scaling)
        else:
            total = total if total.ndim == 2 else total.flatten(1)
            total = torch.addmm(total, *factors, alpha=sign * scaling)
        if rows is not None and sign > 0:
            total = total * rows
    return total.view(weight.shape).to(weight.dtype)


def merge(base: nn.Module, *updates: Update) -> None:
    """Add updates, whose tensors nobody else may write to, to the base layer's parameters.

    Raises:
        TypeError, ValueError: as `own_weight`. Nothing was changed.
    """
    changes = []
    for update in updates:
        weight = own_weight(base, "base_layer", update.parameter)
        record = _current_record(base, weight, update.parameter)
        if record is None:
            # A sharded weight is written in place, since FSDP2 owns that very parameter.
            record = _Record(weight.detach().clone() if is_dtensor(weight) else weight, ())
        changes.append(_change(weight, _Record(record.own, (*record.updates, update))))
    _store(base, updates, changes)


def unmerge(base: nn.Module, *updates: Update) -> None:
    """Take updates, the objects that `merge` was given, out of the base layer's parameters.

    Raises:
        TypeError, ValueError: as `own_weight`, or `base` is not what an update was merged into,
            or is sharded where it wasn't. Nothing was changed.
    """
    changes = []
    for update in updates:
        weight = own_weight(base, "base_layer", update.parameter)
        record = _current_record(base, weight, update.parameter)
        if record is None or not any(each is update for each in record.updates):
            raise ValueError(
                "base_layer: expected the layer that the adapter was merged into, got another"
            )
        others = tuple(u for u in record.updates if u is not update)
        changes.append(_change(weight, _Record(record.own, others)))
    _store(base, updates, changes)


def unmerged(base: nn.Module) -> Tensor:
    """Return the base layer's weight as it is without any update.

    Raises:
        TypeError, ValueError: as `own_weight`.
    """
    weight = own_weight(base, "base_layer")
    record = _current_record(base, weight, "weight")
    return weight if record is None else record.own


def own_weight(module: nn.Module, name: str, parameter: str = "weight") -> Tensor:
    """Return the parameter that a module multiplies by.

    parameter: its name; another than "weight" is that of experts.

    Raises:
        TypeError, ValueError: it is none that a product could be merged into or from.
    """
    expected = f"{name}.{parameter}: expected a float parameter to merge"
    if parametrize.is_parametrized(module, parameter):
        raise TypeError(f"{expected}, got one that a parametrization computes")
    weight: Any = module._parameters.get(parameter)
    if weight is None:
        parts = ", ".join(key for key in module._parameters if key.startswith(f"{parameter}_"))
        got = f"one that is computed from {parts}" if parts else f"none in {type(module).__name__}"
        raise TypeError(f"{expected}, got {got}")
    if type(weight) is not nn.Parameter and not is_dtensor(weight):
        raise TypeError(f"{expected}, got a {type(weight).__name__}")
    kind = next((kind for kind in _KINDS if isinstance(module, kind)), nn.Linear)
    ndim, is_expert = _KINDS[kind], parameter != "weight"
    if not is_expert and (type(module).forward is not kind.forward or "forward" in vars(module)):
        raise TypeError(
            f"{name}: expected torch.nn.{kind.__name__}'s own forward to merge, got one of "
            f"{type(module).__name__}"
        )
    if weight.dtype not in FLOAT_DTYPES or weight.layout is not torch.strided:
        raise TypeError(f"{expected}, got {weight.dtype}, {weight.layout}")
    if weight.is_meta or weight.ndim != (3 if is_expert else ndim):
        where = "on meta" if weight.is_meta else f"of shape {list(weight.shape)}"
        raise ValueError(f"{expected}, got one {where}")
    check_memory(**{f"{name}.{parameter}": weight})
    return weight


def _current_record(base: nn.Module, weight: Tensor, parameter: str) -> _Record | None:
    """Return what is merged into `weight`; what others wrote to it since counts as its own."""
    record: _Record | None = vars(base).get(_RECORDS, {}).get(parameter)
    if record is None:
        return None
    if is_dtensor(weight) is not is_dtensor(record.own):
        raise ValueError(
            f"base_layer.{parameter}: expected it sharded or whole as when it was merged into, got "
            f"a {type(weight).__name__} (FSDP2: call the module's reshard)"
        )
    # The record stays where it was, so a weight that moved meanwhile equals the moved sum.
    expected = with_updates(record.own, *record.updates).to(weight)
    if torch.isclose(weight, expected, rtol=0.0, atol=0.0, equal_nan=True).all():
        return record
    own = with_updates(weight, *record.updates, sign=-1)
    for update in record.updates:
        if update.gain is not None:  # a gain of 0 left nothing of a row
            own = torch.where(update.gain.to(own.device)[:, None] == 0, record.own.to(own), own)
    return _Record(nn.Parameter(own, record.own.requires_grad), record.updates)


def _change(weight: Tensor, record: _Record) -> _Change:
    own, updates = record
    value = own
    if updates:
        value = nn.Parameter(with_updates(own, *updates).to(weight), requires_grad=False)
    elif own.dtype != weight.dtype or own.device != weight.device:
        value = nn.Parameter(own.to(weight), own.requires_grad)
    return _Change(weight, record, value)


def _store(base: nn.Module, updates: tuple[Update, ...], changes: list[_Change]) -> None:
    """Let the base layer hold the records' sums: as new parameters, unless they are sharded."""
    records = vars(base).setdefault(_RECORDS, {})
    for update, (weight, record, value) in zip(updates, changes, strict=True):
        if is_dtensor(weight):
            weight.copy_(value)
        else:
            setattr(base, update.parameter, value)
        records[update.parameter] = record
        if not record.updates:
            del records[update.parameter]
    if not records:
        del vars(base)[_RECORDS]

"""How the operators run on DTensors: what a rank makes of y and the gradients from its shards.

Registered with DTensor when its tensors are first met; the module is imported only then. One mesh
dimension may split the layer in one of the ways below, and DTensor combines them on a mesh of
several, choosing what moves the fewest bytes. None needs more of W than a rank has of it.

    way        x     W     A     B     bias    y     dx    dA    dB    dbias
    whole      all   all   all   all   all     all   all   all   all   all
    columns    all   N     all   N     N       N     sum   sum   N     N
    rows       K     K     K     all   sum     sum   K     K     sum   all
    batch      M     all   all   all   all     M     M     sum   sum   sum

N, K, M: shards of that dimension; sum: terms of a sum over ranks, not yet added. "columns" and
"rows" are the two ways of tensor parallelism.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from lora_kernels.dispatch import IMPLEMENTATIONS
from lora_kernels.operands.call import Adapter, LinearCall
from lora_kernels.operands.dropout import Dropout
from lora_kernels.operands.weight import Dense
from lora_kernels.registration import operators

ALL, SUM = Replicate(), Partial()


class Way(NamedTuple):
    """Where each tensor of a call lies, for one dimension of the mesh."""

    x: Placement
    weight: Placement
    lora_A: Placement
    lora_B: Placement
    bias: Placement
    y: Placement
    xa: Placement
    dy: Placement
    dx: Placement
    da: Placement
    db: Placement
    dbias: Placement


def _ways(ndim: int) -> list[Way]:
    """Return the ways to split a call whose x has `ndim` dimensions."""
    first, last = Shard(0), Shard(ndim - 1)
    whole = Way(*[ALL] * 12)
    columns = whole._replace(weight=first, lora_B=first, bias=first, y=last, dy=last)
    rows = whole._replace(x=last, weight=Shard(1), lora_A=Shard(1), bias=SUM, y=SUM, xa=SUM)
    ways = [
        whole,
        columns._replace(dx=SUM, da=SUM, db=first, dbias=first),
        rows._replace(dx=last, da=Shard(1), db=SUM),
    ]
    if ndim > 1:
        batch = whole._replace(x=first, y=first, xa=first, dy=first, dx=first)
        ways.append(batch._replace(da=SUM, db=SUM, dbias=SUM))
    return ways


def _placed(way: Way, names: str, given: tuple[Any, ...]) -> list[Placement | None]:
    """Return the placement of each tensor that is given, None for one that is not."""
    placements = (getattr(way, name) for name in names.split())
    return [p if t is not None else None for p, t in zip(placements, given, strict=True)]


def _whole(*given: Any) -> list[Placement | None]:
    return [ALL if t is not None else None for t in given]


def _forward_rule(x: Any, *flat: Any) -> list[Any]:
    """Return for each way the placements of y and xa, and of x and what a call is made flat to."""
    weight, _, _, *adapter, bias, seed, _, scaling_tensor, _ = flat
    (whole_seed, whole_scaling) = _whole(seed, scaling_tensor)
    rules = []
    for way in _ways(x.ndim):
        first = _placed(way, "x weight", (x, weight))
        second = _placed(way, "lora_A lora_B bias", (*adapter, bias))
        # Between W and A parts, of which a sharded W has none, and its format.
        inputs = [*first, None, None, *second, whole_seed, None, whole_scaling, None]
        rules.append(([way.y, way.xa], inputs))
    return rules


def _backward_rule(dy: Any, x: Any, xa: Any, *flat: Any) -> list[Any]:
    """Return the same for the gradients."""
    weight, _, _, *adapter, seed, _, scaling_tensor, _, _ = flat
    (whole_seed, whole_scaling) = _whole(seed, scaling_tensor)
    rules = []
    for way in _ways(dy.ndim):
        first = _placed(way, "dy x xa weight", (dy, x, xa, weight))
        second = _placed(way, "lora_A lora_B", tuple(adapter))
        inputs = [*first, None, None, *second, whole_seed, None, whole_scaling, None, None]
        rules.append(([way.dx, way.da, way.db, way.dbias], inputs))
    return rules


@cache
def register_rules() -> None:
    """Tell DTensor how every implementation's operators run on shards."""
    rules: list[tuple[str, Callable[..., Any]]] = [
        ("forward", _forward_rule),
        ("backward", _backward_rule),
    ]
    for direction, rule in rules:
        handles = [getattr(operators("lora_linear", i.name), direction) for i in IMPLEMENTATIONS]
        register_sharding(handles)(rule)


def sharded_call(x: Tensor, call: LinearCall) -> LinearCall:
    """Return a call as the operators take it on DTensors."""
    if not torch.compiler.is_compiling():  # which can't trace it, and comes after a first look
        register_rules()
    weight, (a, b, scaling), bias, dropout = call
    if dropout is not None:
        dropout = Dropout(_shard_seed(dropout.seed, x), dropout.threshold)
    return LinearCall(
        Dense(_reduced_gradient(weight.stored)),
        Adapter(_reduced_gradient(a), _reduced_gradient(b), scaling),
        None if bias is None else _reduced_gradient(bias),
        dropout,
    )


def _reduced_gradient(parameter: Any) -> Tensor:
    """Return the parameter so that its gradient will lie as it does itself.

    Without this the gradient of a replicated adapter would stay a sum over ranks, to be added up
    anew at each use.
    """
    if not parameter.requires_grad:
        return parameter
    return parameter.redistribute(placements=parameter.placements)


def _shard_seed(seed: Tensor, x: Any) -> Tensor:
    """Return the key of this rank's dropout mask: one for each shard of x.

    A mask is a function of an element's position in what a rank holds, so that one key would drop
    the same positions of every shard.
    """
    mesh, shard = x.device_mesh, 0
    for dimension, placement in enumerate(x.placements):
        if placement.is_shard():
            shard = shard * mesh.size(dimension) + mesh.get_local_rank(dimension)
    return DTensor.from_local(seed + shard, mesh, [ALL] * mesh.ndim, run_check=False)

"""Batches whose samples belong to different adapters of a layer, as one call.

PEFT computes them adapter by adapter, without gradients; a fused call has one product with the
layer's weight, and reads the adapters' factors where they lie.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.bypass import (
    PLAIN_TENSORS,
    dropout_reason,
    everywhere_reason,
    inference_reason,
    read_linear,
)
from lora_kernels.dispatch import refusal
from lora_kernels.operands.call import autocast_dtype
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.grouped import NO_ADAPTER
from lora_kernels.operands.mixed import MixedCall
from lora_kernels.operands.request import Request
from lora_kernels.ops import mixed as op
from lora_kernels.ops.grouped import run as run_grouped

BASE = "__base__"  # PEFT's word for no adapter
# Rows an adapter below which torch's operators, which copy all adapters' factors, cost what the one
# call spares. 2026-11-30, Zen 3, float32, 2048x2048, rank 16: 0.98 to 1.09 of PEFT's time for 1
# and 4 rows, 0.96 to 1.01 for 32. The compiled part, which copies none: 0.83 to 0.91 for 1 and 4.
_FEW_ROWS = 16


class Samples:
    """The adapters of a batch's samples, by name; all layers of a model ask the same of them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._owners: dict[tuple[str, ...], Tensor] = {}

    @torch.inference_mode(False)  # a later layer's call may be recorded
    def owners(self, known: tuple[str, ...]) -> Tensor:
        """Return the number of each sample's adapter among those that a layer knows."""
        if known not in self._owners:
            numbers = {name: i for i, name in enumerate(known)}
            found = [numbers.get(name, NO_ADAPTER) for name in self.names]
            self._owners[known] = torch.tensor(found, dtype=torch.int32)
        return self._owners[known]


def few_rows_reason(x: Any, samples: Samples, impl: str) -> str | None:
    """Return why PEFT's forward, which serves inference, is as fast; None where it isn't."""
    if impl != "auto" or not isinstance(x, Tensor) or x.ndim < 2:
        return None
    adapters = len({*samples.names} - {BASE})
    if x.numel() // max(x.shape[-1], 1) >= _FEW_ROWS * adapters:
        return None
    request = Request(op.OP, x.device, autocast_dtype(x) or x.dtype, 1, False)
    if refusal("cpu", request) is None:
        return None
    return f"fewer than {_FEW_ROWS} rows an adapter"


class MixedParts(NamedTuple):
    """What a fused call of several adapters takes of a layer."""

    weight: Tensor
    bias: Tensor | None
    factors: dict[str, tuple[Tensor, Tensor, float]]  # by name: A, B, scaling
    dropout_p: float


def adapters_of(layer: Any, names: Sequence[str] | None) -> list[str]:
    """Return which adapters a layer has, of those named."""
    kept = (layer.lora_A, layer.lora_embedding_A)
    return [name for each in kept for name in each if names is None or name in names]


def mixed_parts(layer: Any, names: Sequence[str]) -> MixedParts | str:
    """Return what a fused call of these adapters needs, or why it is left to PEFT.

    An adapter that the layer doesn't have adds nothing to it, as in PEFT.
    """
    if layer._disable_adapters:
        return "adapters disabled"
    if layer.merged_adapters:
        return f"merged: {', '.join(layer.merged_adapters)}"
    modules = layer._modules
    own = read_linear(modules["base_layer"])
    reason = everywhere_reason() if not isinstance(own, str) else f"base layer {own}"
    if isinstance(own, str) or reason is not None:
        return str(reason)
    if own[0].requires_grad and torch.is_grad_enabled():
        return "base layer's weight requires grad"
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    drops: set[float] = set()
    for name in dict.fromkeys(names):
        if name == BASE or name not in modules["lora_A"]._modules:
            continue
        found = _factors(layer, name, own[0])
        if isinstance(found, str):
            return f"adapter {name!r}: {found}"
        a, b, scaling, dropout = found
        factors[name] = a, b, scaling
        drops.add(dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0)
    if len(drops) > 1:
        return "the adapters' probabilities of dropout differ"
    return MixedParts(*own, factors, drops.pop() if drops else 0.0)


def forward(layer: Any, x: Any, samples: Samples, impl: str, path: str = "") -> Tensor | str:
    """Return a layer's output for a batch of several adapters, or why it is left to PEFT."""
    parts = mixed_parts(layer, samples.names)
    if isinstance(parts, str):
        return parts
    weight, bias, factors, p = parts
    if type(x) not in PLAIN_TENSORS or x.ndim < 2:
        return f"x is a {type(x).__name__} of shape {list(x.shape)}"
    if not factors:
        return "no adapter of the batch is this layer's"
    if impl == "auto" and not x.is_cpu:
        return f"batches of several adapters weren't tried on {x.device.type}"
    all_a, all_b = [a for a, _, _ in factors.values()], [b for _, b, _ in factors.values()]
    reason = inference_reason(x, weight, *all_a, *all_b)
    if reason is not None:
        return reason
    cast = autocast_dtype(x)
    if cast is not None:
        x, weight = x.to(cast), weight.to(cast)
        bias = None if bias is None else bias.to(cast)
    rows, dropout = x.reshape(-1, x.shape[-1]), drawn(p, None, x.device) if p else None
    scalings = torch.tensor([s for _, _, s in factors.values()], dtype=torch.float64)
    owners = samples.owners(tuple(factors))
    call = MixedCall(weight, all_a, all_b, scalings, owners, bias, dropout)
    try:
        op.check(rows, call)
    except (TypeError, ValueError) as error:
        return str(error)
    if op.serves(impl, rows):
        y = op.run(rows, call, impl, path)
    else:
        op.check_all_memory(call, x=rows)
        with torch.autocast(x.device.type, enabled=False):  # else it would cast stacked factors
            y = run_grouped(rows, call.as_grouped(len(rows))[0], impl, path)
    return y.view(*x.shape[:-1], y.shape[1])


def _factors(
    layer: Any, name: str, weight: Tensor
) -> tuple[Tensor, Tensor, float, nn.Module] | str:
    """Return an adapter's A, B, scaling and dropout, or why it is left to PEFT."""
    if name in layer.lora_variant or layer.use_dora.get(name):
        return "another variant of LoRA"
    modules = layer._modules
    a, b = (read_linear(modules[factor]._modules[name]) for factor in ("lora_A", "lora_B"))
    if isinstance(a, str):
        return f"lora_A {a}"
    if isinstance(b, str):
        return f"lora_B {b}"
    if a[1] is not None or b[1] is not None:
        return "a bias"
    reason = dtype_reason(a[0].dtype, b[0].dtype, autocast_dtype(weight))
    if reason is not None:
        return reason
    (n, k), ranks = weight.shape, a[0].shape[:1]
    for t, shape in ((a[0], (*ranks, k)), (b[0], (n, *ranks))):
        if type(t) not in PLAIN_TENSORS or t.is_meta or t.shape != shape:
            return f"no plain factors for a weight of shape {list(weight.shape)}"
    dropout = modules["lora_dropout"]._modules[name]
    reason, scaling = dropout_reason(dropout), layer.scaling[name]
    if reason is None and (type(scaling) is not float or scaling - scaling != 0.0):
        reason = f"a scaling of {scaling}"
    return (a[0], b[0], scaling, dropout) if reason is None else reason


def dtype_reason(a: torch.dtype, b: torch.dtype, cast: torch.dtype | None) -> str | None:
    """Return why PEFT's products of x, A and B refuse the factors' dtypes, or None."""
    if cast is None and a != b:
        return f"lora_A is {a}, lora_B {b}"
    if cast is not None and torch.float64 in (a, b):
        return "lora_A or lora_B is float64, which autocast leaves as it is"
    return None

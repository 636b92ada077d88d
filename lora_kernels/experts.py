"""Modules of experts as transformers' decorator describes them, and their forward, fused.

The forward is transformers' `grouped_mm_experts_forward` by `grouped_lora_linear`: what a module
says of its gate, biases and norm decides, not its name.
"""

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from lora_kernels.bypass import hooks_reason, origin, tensors_reason
from lora_kernels.checks import FLOAT_DTYPES
from lora_kernels.dispatch import preferred_of_groups, refusal
from lora_kernels.impl.eager import grouped_mm
from lora_kernels.operands.call import Adapter, autocast_dtype
from lora_kernels.operands.dropout import Dropout
from lora_kernels.operands.grouped import NO_ADAPTER, GroupedCall, Groups
from lora_kernels.operands.request import Request
from lora_kernels.ops.grouped import run
from lora_kernels.ops.grouped_checks import check

_TRANSFORMERS = "transformers.integrations.moe"
# What transformers' decorator writes on each module.
_SAID = {"has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel"}
_ANY_DTYPE = ("grouped_mm", None)  # forwards that cast x to W's dtype, under autocast too
_BY_LINEAR = ("eager", "batched_mm")
_RANK = 16  # of no adapter at all, one that a GPU's tiles don't pad


class ExpertsLinear(NamedTuple):
    """One of a module's linear layers: W [E, N, K], bias [E, N] or None, its adapter or None."""

    weight: Tensor
    bias: Tensor | None
    adapter: Adapter | None = None
    dropout: Dropout | None = None

    def call(self, x: Tensor, groups: Groups) -> GroupedCall:
        """Return the call of x."""
        adapter, (experts, n, k) = self.adapter, self.weight.shape
        if adapter is not None:
            return GroupedCall(self.weight, adapter, self.bias, groups, self.dropout, x.shape[0])
        zeros = self.weight.new_zeros
        nobody = Adapter(zeros(1, _RANK, k), zeros(1, n, _RANK), 1.0)
        call = GroupedCall(self.weight, nobody, self.bias, groups, None, x.shape[0])
        if grouped_mm.serves(x, call):
            # It has no groups without an adapter.
            every = Adapter(zeros(experts, _RANK, k), zeros(experts, n, _RANK), 1.0)
            return call._replace(adapter=every)
        numbers = torch.full_like(groups.offsets, NO_ADAPTER)
        return call._replace(groups=groups._replace(adapters=numbers))


# A token's experts, in the order in which they are called: into the inner size and back.
Linears = tuple[ExpertsLinear, ExpertsLinear]


def experts_forward(
    x: Tensor, ids: Tensor, gates: Tensor, experts: Any, linears: Linears, impl: str
) -> Tensor:
    """Return what transformers' experts compute for x [T, H] routed to ids [T, k] by gates [T, k].

    Rows are sorted by expert, ties in their order, and written back where they belong by the second
    layer: so sums over a token's experts have one order. With dropout the first one writes them
    back, too, since a mask's rows are those of what is written.
    """
    first, second = linears
    tokens, slots = ids.shape
    sorted_ids, order = torch.sort(ids.reshape(-1), stable=True)
    numbers = torch.arange(len(first.weight), device=ids.device)
    offsets = torch.searchsorted(sorted_ids, numbers, right=True, out_int32=True)
    back = None if first.dropout is None else order
    rows = x.to(first.weight.dtype)
    hidden = run(rows, first.call(rows, Groups(offsets, order // slots, back)), impl)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    hidden = hidden.to(second.weight.dtype)
    y = run(hidden, second.call(hidden, Groups(offsets, back, order)), impl)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    weighted = y * gates.reshape(-1, 1)
    return weighted.view(tokens, slots, -1).sum(1).to(x.dtype)


def kind_reason(module: Any) -> str | None:
    """Return why a module isn't experts of the kind that `experts_forward` describes, or None."""
    kind, own = type(module), vars(module)
    if origin(getattr(kind, "forward", None)) != _TRANSFORMERS or not own.keys() >= _SAID:
        return f"is {kind.__name__}, not experts as transformers decorates them"
    return "is expert parallel" if own["_is_expert_parallel"] else None


def module_reason(module: Any) -> str | None:
    """Return why a call of a module isn't what `experts_forward` describes, or None."""
    reason = kind_reason(module)
    if reason is not None:
        return reason
    chosen = module.config._experts_implementation
    if chosen not in (*_ANY_DTYPE, *_BY_LINEAR):
        return f"has experts_implementation {chosen!r}"
    return hooks_reason(module)


def names_of(module: Any) -> tuple[str, str]:
    """Return the names of the weights of experts, in the order in which they are called."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def is_plain(weight: Any) -> TypeGuard[nn.Parameter]:
    """Whether a weight is a parameter of several experts."""
    return type(weight) is nn.Parameter and weight.ndim == 3 and weight.dtype in FLOAT_DTYPES


def read_linear(module: Any, name: str, adapter: Adapter | None) -> ExpertsLinear | str:
    """Return a linear layer of experts with its adapter, or why it can't be fused."""
    parameters = vars(module)["_parameters"]
    weight, bias = parameters.get(name), parameters.get(f"{name}_bias")
    if not is_plain(weight):
        return f"base layer's {name} is no parameter of experts in a float dtype"
    if weight.requires_grad:
        return f"base layer's {name} requires grad"
    if module.has_bias != (bias is not None):
        return f"base layer's {name}_bias is {'missing' if bias is None else 'unknown to it'}"
    weight = weight.transpose(1, 2) if module.is_transposed else weight
    return ExpertsLinear(weight, bias, adapter)


def factors(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor] | None:
    """Return the views A [E, R, K] and B [E, N, R] of PEFT's parameters, or None if they aren't.

    PEFT has A's of the experts one after the other, [E · R, K], and B's adjacent, [N, R · E].
    """
    fit = a.ndim == b.ndim == 2 and 0 < a.shape[0] == b.shape[1]
    if not fit or a.shape[0] % experts:
        return None
    rank = a.shape[0] // experts
    return a.reshape(experts, rank, -1), b.reshape(-1, rank, experts).permute(2, 0, 1)


def call_reason(
    x: Any, ids: Any, gates: Any, experts: Any, linears: Linears, impl: str
) -> str | None:
    """Return why a call isn't fused, its arguments not fitting among others; or None."""
    reason = tensors_reason(x=x, top_k_index=ids, top_k_weights=gates)
    for weight, bias, adapter, _ in () if reason else linears:
        given = {"weight": weight, "bias": bias}
        given |= {} if adapter is None else {"lora_A": adapter.a, "lora_B": adapter.b}
        present = {name: t for name, t in given.items() if t is not None}
        reason = reason or tensors_reason(**present)
    if reason is not None:
        return reason
    if x.ndim != 2 or ids.ndim != 2 or ids.shape != gates.shape or len(ids) != len(x):
        return f"x has shape {list(x.shape)}, top_k_index {list(ids.shape)}"
    if ids.dtype != torch.int64:
        return f"top_k_index is {ids.dtype}"
    first = linears[0].weight
    reason = _dtype_reason(x, experts.config._experts_implementation, linears)
    if reason is not None:
        return reason
    # The second layer's inputs are as wide as its weight says.
    for linear, width in zip(linears, (x.shape[1], linears[1].weight.shape[2]), strict=True):
        row, nobody = first.new_empty(0, width), ids.new_empty(len(first), dtype=torch.int32)
        call = linear.call(row, Groups(nobody))
        try:
            check(row, call)
        except (TypeError, ValueError) as error:
            return str(error)
        if impl == "auto" and not (x.is_cpu or grouped_mm.serves(row, call)):
            rank = call.adapter.a.shape[1]
            request = Request("grouped_lora_linear", x.device, first.dtype, rank, False)
            reason = refusal("triton", request)
            if reason is None and preferred_of_groups(x, rank, dropout=False) != "auto":
                reason = f"pads rank {rank}, which wasn't tried on a GPU"
            if reason is not None:
                # The host would wait for the GPU, and launch group after group.
                return f"no kernel of grouped_lora_linear: triton {reason}"
    return None


def _dtype_reason(x: Tensor, implementation: str | None, linears: Linears) -> str | None:
    """Return why an implementation casts, or refuses, dtypes that a fused call would take."""
    if implementation not in _BY_LINEAR:
        return None
    cast = autocast_dtype(x)
    for weight, *_ in linears:
        if cast not in (None, weight.dtype):
            return f"autocast casts its {weight.dtype} weights"
        if cast is None and weight.dtype != x.dtype:
            return f"x is {x.dtype}, its weights {weight.dtype}"
    return None

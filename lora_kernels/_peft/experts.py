"""PEFT's LoRA of experts' parameters with a fused forward; imported only when a model is patched.

PEFT wraps a module of experts once for each parameter that it adapts, the wrappers around one
another, and computes with W + Δ of all experts. A fused call of the outermost is the forward that
transformers has for such modules, `grouped_mm_experts_forward`, by `grouped_lora_linear`: what the
module says of its gate, biases and norm decides, not its name.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from lora_kernels._peft.fused import Fused, tensors_reason
from lora_kernels._peft.summed import MOST_RANKS
from lora_kernels.bypass import everywhere_reason, hooks_reason, origin, read_linear, scaling_reason
from lora_kernels.checks import FLOAT_DTYPES, check_memory
from lora_kernels.dispatch import refusal
from lora_kernels.impl.eager import grouped_mm
from lora_kernels.operands.call import Adapter, autocast_dtype
from lora_kernels.operands.grouped import NO_ADAPTER, GroupedCall, Groups
from lora_kernels.operands.request import Request
from lora_kernels.ops.grouped import run
from lora_kernels.ops.grouped_checks import check

_PEFT, _TRANSFORMERS = "peft.tuners.lora.layer", "transformers.integrations.moe"
# What transformers' decorator writes on each module.
_SAID = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")
_ANY_DTYPE = ("grouped_mm", None)  # forwards that cast x to W's dtype, under autocast too
_BY_LINEAR = ("eager", "batched_mm")


class ExpertsLinear(NamedTuple):
    """One of a module's linear layers: W [E, N, K], bias [E, N] or None, its adapter or None."""

    weight: Tensor
    bias: Tensor | None
    adapter: Adapter | None

    def call(self, x: Tensor, groups: Groups) -> GroupedCall:
        """Return the call of x."""
        adapter, (experts, n, k) = self.adapter, self.weight.shape
        if adapter is not None:
            return GroupedCall(self.weight, adapter, self.bias, groups, None, x.shape[0])
        zeros = self.weight.new_zeros
        nobody = Adapter(zeros(1, 1, k), zeros(1, n, 1), 1.0)
        call = GroupedCall(self.weight, nobody, self.bias, groups, None, x.shape[0])
        if grouped_mm.serves(x, call):
            # It has no groups without an adapter.
            return call._replace(adapter=Adapter(zeros(experts, 1, k), zeros(experts, n, 1), 1.0))
        numbers = torch.full_like(groups.offsets, NO_ADAPTER)
        return call._replace(groups=groups._replace(adapters=numbers))


# The experts' module and its two layers.
Parts = tuple[Any, tuple[ExpertsLinear, ExpertsLinear]]


class FusedExperts(Fused, ParamWrapper):
    """PEFT's `lora.ParamWrapper` around experts, computed by `grouped_lora_linear` if it can be."""

    _lora_kernels_theirs = ParamWrapper
    _lora_kernels_op = "grouped_lora_linear"

    def _lora_kernels_left(self) -> str | None:
        parts = fused_parts(self)
        return parts if isinstance(parts, str) else None

    def _call_of(
        self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any], impl: str
    ) -> Callable[[], Tensor] | str:
        """Return what computes a call of a module of experts, or why it is PEFT's to compute."""
        names = ("top_k_index", "top_k_weights")
        routed = (*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))
        if len(routed) != 2 or len(args) + len(kwargs) != 2:
            return "called with other than hidden_states, top_k_index, top_k_weights"
        parts = fused_parts(self)
        if isinstance(parts, str):
            return parts
        experts, linears = parts
        reason = _call_reason(x, *routed, parts, impl)
        if reason is not None:
            return reason
        return partial(experts_forward, x, *routed, experts, linears, impl)


def fused_parts(layer: Any) -> Parts | str:
    """Return the experts' module and its two linear layers, or why PEFT's forward is kept."""
    if origin(ParamWrapper.forward) != _PEFT:
        return "peft's forward was replaced"
    adapters: dict[str, tuple[Any, Adapter]] = {}
    module = layer
    while isinstance(module, ParamWrapper):
        reason = None if module is layer else hooks_reason(module)
        adapter = _adapter(module) if reason is None else f"its base_layer {reason}"
        if isinstance(adapter, str):
            return adapter
        adapters[module.parameter_name] = module, adapter
        module = module._modules["base_layer"]
    reason = _module_reason(module) or everywhere_reason()
    if reason is not None:
        return f"base layer {reason}"
    names = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
    if not adapters.keys() <= set(names):
        return f"adapts {', '.join(adapters)}, not {' or '.join(names)}"
    first, second = (_linear(module, name, adapters.get(name)) for name in names)
    if isinstance(first, str):
        return first
    return second if isinstance(second, str) else (module, (first, second))


def experts_forward(
    x: Tensor,
    ids: Tensor,
    gates: Tensor,
    experts: Any,
    linears: tuple[ExpertsLinear, ExpertsLinear],
    impl: str,
) -> Tensor:
    """Return what transformers' experts compute for x [T, H] routed to ids [T, k] by gates [T, k].

    Rows are sorted by expert, ties in their order, and written back where they belong by the second
    layer: so sums over a token's experts have one order.
    """
    first, second = linears
    tokens, slots = ids.shape
    sorted_ids, order = torch.sort(ids.reshape(-1), stable=True)
    numbers = torch.arange(len(first.weight), device=ids.device)
    offsets = torch.searchsorted(sorted_ids, numbers, right=True, out_int32=True)
    by_token = Groups(offsets, order // slots)
    rows = x.to(first.weight.dtype)
    hidden = run(rows, first.call(rows, by_token), impl)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    hidden = hidden.to(second.weight.dtype)
    y = run(hidden, second.call(hidden, Groups(offsets, scatter=order)), impl)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    weighted = y * gates.reshape(-1, 1)
    return weighted.view(tokens, slots, -1).sum(1).to(x.dtype)


def _adapter(wrapper: Any) -> Adapter | str:
    """Return A [E, R, K], B [E, N, R] and scaling of a wrapper's active adapters, or why not."""
    if wrapper._disable_adapters:
        return "adapters disabled"
    if wrapper.merged_adapters:
        return f"merged: {', '.join(wrapper.merged_adapters)}"
    known = wrapper._modules["lora_A"]._modules
    names = [name for name in wrapper.active_adapters if name in known]
    if not names:
        return "no active adapter"
    if wrapper.num_experts == 1:
        return f"{wrapper.parameter_name} has no experts, or one"
    found = []
    for name in names:
        adapter = _factors(wrapper, name)
        if isinstance(adapter, str):
            return adapter
        found.append(adapter)
    return found[0] if len(found) == 1 else _summed(found)


def _factors(wrapper: Any, name: str) -> Adapter | str:
    """Return one adapter of all experts: PEFT has A's one after the other, B's adjacent."""
    modules, experts = wrapper._modules, wrapper.num_experts
    a, b = (read_linear(modules[factor]._modules[name]) for factor in ("lora_A", "lora_B"))
    if isinstance(a, str):
        return f"lora_A {a}"
    if isinstance(b, str):
        return f"lora_B {b}"
    reason = scaling_reason(wrapper.scaling[name])
    if reason is not None:
        return reason
    sizes = a[0].shape, b[0].shape
    fit = a[0].ndim == b[0].ndim == 2 and 0 < sizes[0][0] == sizes[1][1]
    if b[1] is not None or not fit or sizes[0][0] % experts:
        return f"lora_A {list(sizes[0])} and lora_B {list(sizes[1])} aren't of {experts} experts"
    rank = sizes[0][0] // experts
    own = a[0].reshape(experts, rank, -1), b[0].reshape(-1, rank, experts).permute(2, 0, 1)
    return Adapter(*own, wrapper.scaling[name])


def _summed(adapters: list[Adapter]) -> Adapter | str:
    """Return one adapter of all ranks, whose product is the sum of theirs, or why not."""
    if sum(a.shape[1] for a, _, _ in adapters) > MOST_RANKS:
        return f"their ranks are more than {MOST_RANKS} together"
    kinds = {(a.shape[2], b.shape[1], a.dtype, b.dtype, a.device) for a, b, _ in adapters}
    if len(kinds) > 1:
        return "their sizes, dtypes or devices differ"
    for a, b, _ in adapters:
        check_memory(lora_A=a, lora_B=b)
    wide = [b.float() if b.dtype.itemsize == 2 else b for _, b, _ in adapters]
    scaled = [b * scaling for b, (_, _, scaling) in zip(wide, adapters, strict=True)]
    return Adapter(torch.cat([a for a, _, _ in adapters], 1), torch.cat(scaled, 2), 1.0)


def _module_reason(module: Any) -> str | None:
    """Return why a module isn't experts whose forward transformers' own function describes."""
    kind, own = type(module), vars(module)
    if origin(kind.forward) != _TRANSFORMERS or not all(name in own for name in _SAID):
        return f"is {kind.__name__}, not experts as transformers decorates them"
    if own["_is_expert_parallel"]:
        return "is expert parallel"
    chosen = module.config._experts_implementation
    if chosen not in (*_ANY_DTYPE, *_BY_LINEAR):
        return f"has experts_implementation {chosen!r}"
    return hooks_reason(module)


def _linear(module: Any, name: str, adapted: tuple[Any, Adapter] | None) -> ExpertsLinear | str:
    """Return a linear layer of the experts, or why it can't be fused."""
    parameters = vars(module)["_parameters"]
    weight, bias = parameters.get(name), parameters.get(f"{name}_bias")
    if type(weight) is not nn.Parameter or weight.ndim != 3 or weight.dtype not in FLOAT_DTYPES:
        return f"base layer's {name} is no parameter of experts in a float dtype"
    if weight.requires_grad:
        return f"base layer's {name} requires grad"
    if module.has_bias != (bias is not None):
        return f"base layer's {name}_bias is {'missing' if bias is None else 'unknown to it'}"
    weight = weight.transpose(1, 2) if module.is_transposed else weight
    if adapted is None:
        return ExpertsLinear(weight, bias, None)
    wrapper, adapter = adapted
    # Before 0.19.1 PEFT took the dimensions of W by their order, and A acted on the outputs.
    if getattr(wrapper, "_did_swap_in_out_features", None) is not (not module.is_transposed):
        return f"lora_A of {name} acts on its outputs, as PEFT before 0.19.1 had it"
    return ExpertsLinear(weight, bias, adapter)


def _call_reason(x: Any, ids: Any, gates: Any, parts: Parts, impl: str) -> str | None:
    """Return why a call is PEFT's to compute, or to refuse; None where it is fused."""
    experts, linears = parts
    reason = tensors_reason(x=x, top_k_index=ids, top_k_weights=gates)
    for weight, bias, adapter in () if reason else linears:
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
    cast = autocast_dtype(x)
    first = linears[0].weight
    if cast not in (None, first.dtype) and experts.config._experts_implementation in _BY_LINEAR:
        return f"autocast casts its {first.dtype} weights"
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
            if reason is not None:
                # The host would wait for the GPU, and launch group after group.
                return f"no kernel of grouped_lora_linear: triton {reason}"
    return None

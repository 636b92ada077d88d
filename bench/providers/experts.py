"""Who computes the LoRA layers of a mixture's experts, and a call of each.

A provider takes transformers' module of experts that PEFT has adapted, and returns what computes
the same its way; the frozen experts are what no adapter can do without.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import grouped_mm
from torch.nn.utils import parametrize

import lora_kernels as lk
from bench.measure.beside_peft import FROZEN, OURS, PEFT
from bench.shapes import DTYPES, SCALING

UNCHECKED, THREE_STEPS = "unchecked", "three-steps"
LABELS = {
    FROZEN: "frozen experts",
    PEFT: "PEFT",
    UNCHECKED: "PEFT without torch's check",
    THREE_STEPS: "three grouped_mm",
    OURS: "ours",
}


@dataclass(frozen=True)
class ExpertsCase:
    """A block of experts: so many, so many of them a token, hidden and inner size, tokens.

    kind: whose module, "qwen3" or "gpt-oss". limit: what the project allows ours, of PEFT's time.
    """

    name: str
    experts: int
    slots: int
    hidden: int
    inner: int
    tokens: int
    dtype: str
    limit: float | None = None
    kind: str = "qwen3"
    r: int = 16

    def __str__(self) -> str:
        size = f"{self.experts} experts, {self.slots} a token, {self.hidden} x {self.inner}"
        return f"{self.name}: {size}, {self.tokens} tokens, r={self.r} {self.dtype}"


class Routed(NamedTuple):
    """What a block of experts is called with, and a gradient of its result."""

    x: Tensor
    ids: Tensor
    gates: Tensor
    dy: Tensor


class _Block(nn.Module):
    """A module of experts under a name that PEFT can target."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        y: Tensor = self.experts(x, ids, gates)
        return y


class Call:
    """One provider's forward and backward; all providers' have the same numbers."""

    def __init__(self, case: ExpertsCase, provider: str) -> None:
        torch.manual_seed(0)
        block: Any = _Block(_experts(case).requires_grad_(False))
        self.routed = _routed(case)
        names = (
            [] if provider == FROZEN else [f"experts.{n}" for n in ("gate_up_proj", "down_proj")]
        )
        if names:
            config = LoraConfig(
                r=case.r, lora_alpha=int(SCALING * case.r), init_lora_weights=False,
                target_modules=[], target_parameters=names,
            )  # fmt: skip
            block = get_peft_model(block, config, autocast_adapter_dtype=False)
        self.layer = _CONVERSIONS[provider](block)
        self.trained = [p for p in block.parameters() if p.requires_grad]

    def results(self) -> list[Tensor]:
        """Return y, dx and the factors' gradients."""
        x = self.routed.x.detach().requires_grad_()
        y = self.layer(x, self.routed.ids, self.routed.gates)
        return [y.detach(), *torch.autograd.grad(y, [x, *self.trained], self.routed.dy)]

    def __call__(self) -> None:
        """Run the call and drop what it returns."""
        self.results()


def _experts(case: ExpertsCase) -> nn.Module:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config: Any
    if case.kind == "gpt-oss":
        config = transformers.GptOssConfig(
            hidden_size=case.hidden, intermediate_size=case.inner, num_local_experts=case.experts
        )
    else:
        config = transformers.Qwen3MoeConfig(
            hidden_size=case.hidden, moe_intermediate_size=case.inner, num_experts=case.experts
        )
    config._experts_implementation = "grouped_mm"
    made = GptOssExperts(config) if case.kind == "gpt-oss" else Qwen3MoeExperts(config)
    for p in made.parameters():
        nn.init.normal_(p, std=case.hidden**-0.5)
    return made.to(DTYPES[case.dtype])


def _routed(case: ExpertsCase) -> Routed:
    dtype = DTYPES[case.dtype]
    gates, ids = torch.randn(case.tokens, case.experts).softmax(-1).topk(case.slots)
    x, dy = (torch.randn(case.tokens, case.hidden, dtype=dtype) for _ in range(2))
    return Routed(x, ids, (gates / gates.sum(-1, keepdim=True)).to(dtype), dy)


def _unchecked(block: nn.Module) -> Callable[..., Tensor]:
    """Let PEFT register what computes W + Δ without torch's evaluation of it as a check."""
    register = partial(parametrize.register_parametrization, unsafe=True)

    def forward(*routed: Tensor) -> Tensor:
        with mock.patch.object(parametrize, "register_parametrization", register):
            y: Tensor = block(*routed)
        return y

    return forward


def _patched(block: nn.Module) -> nn.Module:
    if left := lk.patch_peft(block).left:
        raise RuntimeError(f"not patched: {left}")
    return block


def _three_steps(block: Any) -> Callable[..., Tensor]:
    """Compute the adapter branch by products of its own, in the order that Unsloth has.

    Factors are laid out for the products at each call. Written from the description of that order;
    its code is not used.
    """
    outer = block.base_model.model.experts
    inner, experts = outer.base_layer, outer.get_base_layer()

    def linear(wrapper: Any, rows: Tensor, ends: Tensor, ids: Tensor) -> Tensor:
        weight, name = getattr(experts, wrapper.parameter_name), wrapper.active_adapters[0]
        count = len(weight)
        a = wrapper.lora_A[name].weight.reshape(count, -1, rows.shape[1])
        b = wrapper.lora_B[name].weight
        b = b.reshape(len(b), -1, count).permute(2, 1, 0).contiguous()
        stored = weight if experts.is_transposed else weight.transpose(1, 2)
        xa = grouped_mm(rows, a.transpose(1, 2), offs=ends)
        y = grouped_mm(rows, stored, offs=ends)
        y = y + grouped_mm(xa, b, offs=ends) * wrapper.scaling[name]
        if experts.has_bias:
            y = y + getattr(experts, f"{wrapper.parameter_name}_bias")[ids]
        return y

    def forward(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        tokens, slots = ids.shape
        sorted_ids, order = torch.sort(ids.flatten(), stable=True)
        ends = torch.bincount(sorted_ids, minlength=inner.num_experts).cumsum(0).int()
        hidden = linear(inner, x[order // slots], ends, sorted_ids)
        y = linear(outer, experts._apply_gate(hidden), ends, sorted_ids)
        y = y * gates.flatten()[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return y[back].view(tokens, slots, -1).sum(1)

    return forward


_CONVERSIONS: dict[str, Callable[[Any], Callable[..., Tensor]]] = {
    FROZEN: lambda block: block,
    PEFT: lambda block: block,
    UNCHECKED: _unchecked,
    THREE_STEPS: _three_steps,
    OURS: _patched,
}

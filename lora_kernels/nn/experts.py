"""A mixture's experts as an adapted module; it holds parameters and owns no mathematics."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_kernels.bypass import everywhere_reason, scaling_reason
from lora_kernels.checks import check_dropout_p, check_keyword, check_memory
from lora_kernels.experts import (
    ExpertsLinear,
    Linears,
    call_reason,
    experts_forward,
    factors,
    is_plain,
    kind_reason,
    module_reason,
    names_of,
    read_linear,
)
from lora_kernels.merging import Update, with_updates
from lora_kernels.nn.adapted import Adapted
from lora_kernels.nn.arguments import check_settings
from lora_kernels.operands.call import Adapter
from lora_kernels.operands.dropout import drawn
from lora_kernels.usage import Calls


class LoRAExperts(Adapted):
    """Frozen experts of a mixture with a trainable low-rank adapter for each of them::

        y[t] = Σ_j gates[t, j] · down_e(act(up_e(x[t]))),  e = ids[t, j]
        up_e(v) = W_e v + bias_e + scaling · B_e A_e D(v), and so down_e

    `base_layer` is a module of experts as transformers has them (Qwen3-MoE, Mixtral, gpt-oss,
    DeepSeek-V3 and others), whose forward it keeps: gate, biases and norms are its own.
    `lora_A[name]` is [E · r, K] and `lora_B[name]` [N, r · E] for each adapted parameter, in PEFT's
    layout: experts one after the other in A, adjacent in B.

    A call is fused unless it would bypass something: hooks, weights that are computed, a GPU
    without a kernel for it; then the experts are called with W + scaling · B A of them all.

    Args:
        experts: the module to adapt; its device and dtype are the adapter's. It is frozen.
        target_parameters: names of the weights to adapt, of "gate_up_proj" (or "up_proj") and
            "down_proj"; None adapts both.
        r: rank of each expert's adapter, at least 1.
        lora_alpha: numerator of scaling, any finite number.
        lora_dropout: probability in [0, 1) of dropping an input of an adapter branch in training,
            independently for each expert of a token. PEFT has none for experts.
        use_rslora: divide lora_alpha by sqrt(r) instead of r.
        adapter_dtype: of lora_A and lora_B where it shall differ, such as float32 beside bfloat16.
        impl: as for `grouped_lora_linear`.

    Raises:
        TypeError, ValueError: an argument outside what is said above, experts that transformers'
            decorator doesn't describe, or expert parallel ones. `experts` is as it was.

    Precision: as `grouped_lora_linear`; sums over a token's experts as transformers forms them.

    Source: Hu et al., LoRA, arXiv:2106.09685; PEFT's `target_parameters`.

    Example:
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
        >>> sizes = {"hidden_size": 8, "intermediate_size": 4, "num_local_experts": 2}
        >>> layer = lk.LoRAExperts(MixtralExperts(MixtralConfig(**sizes)), r=2)
        >>> {name: list(p.shape) for name, p in layer.lora_A.items()}
        {'gate_up_proj': [4, 8], 'down_proj': [4, 4]}
    """

    base_layer: Any
    _lora_kernels_op = "grouped_lora_linear"

    def __init__(
        self,
        experts: nn.Module,
        *misplaced: NoReturn,
        target_parameters: Sequence[str] | None = None,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> None:
        check_keyword("target_parameters", misplaced)
        check_settings(r, lora_alpha, lora_dropout, "none", adapter_dtype, impl)
        names = check_experts(experts, target_parameters)
        super().__init__()
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.use_rslora, self.impl = use_rslora, impl
        self.base_layer = experts.requires_grad_(False)
        self._lora_kernels_calls = Calls()
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name in names:
            (count, n, k), like = sizes_of(experts, name), getattr(experts, name)
            given = {"device": like.device, "dtype": adapter_dtype or like.dtype}
            self.lora_A[name] = nn.Parameter(torch.empty(count * r, k, **given))
            self.lora_B[name] = nn.Parameter(torch.empty(n, r * count, **given))
        self.reset_lora_parameters()
        self.train(experts.training)

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        *misplaced: NoReturn,
        target_parameters: Sequence[str] | None = None,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> "LoRAExperts":
        """Return a layer around `experts`: what the class makes, by the name other layers have.

        Args:
            experts: the module to adapt; the same object becomes `base_layer` and is frozen.
            target_parameters, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, impl: as the
                class.

        Returns:
            The layer.

        Raises:
            TypeError, ValueError: as the class.

        Example:
            >>> from transformers.models.mixtral import modeling_mixtral as mixtral
            >>> config = mixtral.MixtralConfig(hidden_size=8, intermediate_size=4)
            >>> experts = mixtral.MixtralExperts(config)
            >>> lk.LoRAExperts.from_experts(experts, r=2).base_layer is experts
            True
        """
        settings: dict[str, Any] = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
        settings |= {"use_rslora": use_rslora, "adapter_dtype": adapter_dtype, "impl": impl}
        return cls(experts, *misplaced, target_parameters=target_parameters, **settings)

    def reset_lora_parameters(self) -> None:
        """Draw lora_A as PEFT does (Kaiming uniform, a = sqrt(5)) and zero lora_B."""
        for a, b in zip(self.lora_A.values(), self.lora_B.values(), strict=True):
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(b)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return y [T, H] for hidden_states [T, H], routed by top_k_index and top_k_weights [T, k].

        top_k_index: int64, numbers of experts; one beyond the last stands for none.
        """
        routed = hidden_states, top_k_index, top_k_weights
        if self.merged:
            return self.base_layer(*routed)
        linears = self._linears()
        if isinstance(linears, str):
            return self._left(routed, linears)
        reason = call_reason(*routed, self.base_layer, linears, self.impl)
        if reason is not None:
            return self._left(routed, reason)
        self._note(None)
        if self.training and self.lora_dropout:
            check_dropout_p(self.lora_dropout, name="lora_dropout")
            masks = (drawn(self.lora_dropout, None, hidden_states.device) for _ in linears)
            first, second = (
                each._replace(dropout=None if each.adapter is None else mask)
                for each, mask in zip(linears, masks, strict=True)
            )
            linears = first, second
        return experts_forward(*routed, self.base_layer, linears, self.impl)

    def left_reason(self) -> str | None:
        """Return why a call would form the experts' weights with the adapter; None where fused."""
        linears = self._linears()
        return linears if isinstance(linears, str) else None

    def _linears(self) -> Linears | str:
        """Return the experts' two linear layers with their adapters, or why they aren't fused."""
        experts = self.base_layer
        reason = module_reason(experts)
        if reason is not None:
            return f"base layer {reason}"
        reason = everywhere_reason() or scaling_reason(self.scaling)
        if reason is not None:
            return reason
        found: list[ExpertsLinear] = []
        for name in names_of(experts):
            adapter = self._adapter(name) if name in self.lora_A else None
            linear = read_linear(experts, name, adapter)
            if isinstance(linear, str):
                return linear
            found.append(linear)
        return found[0], found[1]

    def _adapter(self, name: str) -> Adapter:
        a, b, count = self.lora_A[name], self.lora_B[name], sizes_of(self.base_layer, name)[0]
        own = factors(a, b, count)
        if own is None:
            sizes = f"{list(a.shape)} and {list(b.shape)}"
            raise ValueError(f"{name}: expected lora_A, lora_B of {count} experts, got {sizes}")
        return Adapter(*own, self.scaling)

    def _left(self, routed: tuple[Tensor, Tensor, Tensor], reason: str) -> Tensor:
        """Return y by the experts' own forward with the adapter in their weights."""
        self._note(reason)
        if self.training and self.lora_dropout:
            raise RuntimeError(
                f"lora_dropout: expected 0 in a call that isn't fused, since {reason}"
            )
        weights = {
            update.parameter: with_updates(getattr(self.base_layer, update.parameter), update)
            for update in map(self._update, self.lora_A)
        }
        return functional_call(self.base_layer, weights, routed)

    def _update(self, name: str) -> Update:
        """Return what an adapter adds to a parameter as it is stored."""
        a, b, scaling = self._adapter(name)
        if self.base_layer.is_transposed:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        return Update(a, b, float(scaling), parameter=name)

    def _updates(self) -> tuple[Update, ...]:
        found = []
        for name in self.lora_A:
            check_memory(lora_A=self.lora_A[name], lora_B=self.lora_B[name])
            update = self._update(name)
            a, b = update.lora_A.detach().clone(), update.lora_B.detach().clone()
            found.append(update._replace(lora_A=a, lora_B=b))
        return tuple(found)

    def extra_repr(self) -> str:
        """Say what the adapter's settings are, and its state."""
        return f"lora_dropout={self.lora_dropout}, {super().extra_repr()}"


def sizes_of(experts: Any, name: str) -> tuple[int, int, int]:
    """Return E, N, K of one of the weights of experts."""
    count, n, k = getattr(experts, name).shape
    return (count, k, n) if experts.is_transposed else (count, n, k)


def check_experts(experts: Any, names: Sequence[str] | None) -> list[str]:
    """Return the names of the parameters to adapt, in the order in which the module has them.

    Raises:
        TypeError, ValueError: the experts can't be adapted, or have no such parameters.
    """
    reason = kind_reason(experts)
    if reason is not None:
        raise TypeError(
            f"experts: expected a transformers module of experts, got one that {reason}"
        )
    known = [
        name for name, _ in experts.named_parameters(recurse=False) if name in names_of(experts)
    ]
    wanted = known if names is None else names
    if isinstance(wanted, str) or not wanted or not set(wanted) <= set(known):
        raise ValueError(f"target_parameters: expected some of {known}, got {names!r}")
    for name in names_of(experts):
        if not is_plain(getattr(experts, name, None)):
            raise TypeError(f"experts: expected {name} to be a float parameter of several experts")
    return [name for name in known if name in wanted]

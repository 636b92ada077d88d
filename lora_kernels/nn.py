"""The adapted linear layer as a module; it holds parameters and owns no mathematics."""

import math

import torch
from torch import Tensor, nn

from lora_kernels.checks import (
    FLOAT_DTYPES,
    check_dropout_p,
    check_finite,
    check_lora_linear,
    check_rank,
)
from lora_kernels.dispatch import check_impl
from lora_kernels.functional import autocast_dtype, checked_lora_linear
from lora_kernels.packing import Packed, current

BIAS_MODES = ("none", "all", "lora_only")


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank adapter.

        y = x Wᵀ + bias + scaling · D(x) Aᵀ Bᵀ
        scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

    Names are PEFT's: `base_layer` holds W and bias, `lora_A.weight` is [r, in_features],
    `lora_B.weight` is [out_features, r].

    Args:
        in_features: K.
        out_features: N.
        r: rank, at least 1.
        lora_alpha: numerator of scaling.
        lora_dropout: probability in [0, 1) of dropping an input of the adapter branch in training.
        use_rslora: divide lora_alpha by sqrt(r) instead of r.
        bias: "none" freezes the base layer's bias; "all" and "lora_only" train it.
        base_bias: whether the base layer has a bias.
        device, dtype: of the base layer and the adapter.
        adapter_dtype: of lora_A and lora_B where it shall differ, such as float32 beside bfloat16.
        impl: as for `lora_linear`.

    Raises:
        TypeError, ValueError: an argument outside what is said above.
    """

    _unmerged_weight: Tensor | None
    base_layer: nn.Linear
    _lora_kernels_packed: Packed | None = None  # set by `prepack_`

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: str = "none",
        base_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> None:
        check_settings(r, lora_alpha, lora_dropout, bias, adapter_dtype, impl)
        base = nn.Linear(in_features, out_features, bias=base_bias, device=device, dtype=dtype)
        super().__init__()
        self._adapt(base, r, lora_alpha, lora_dropout, use_rslora, bias, adapter_dtype, impl)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: str = "none",
        adapter_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> "LoRALinear":
        """Return a layer around `linear`: the same object becomes `base_layer` and is frozen.

        Args:
            linear: the layer to adapt; its device and dtype are the adapter's.
            r, lora_alpha, lora_dropout, use_rslora, bias, adapter_dtype, impl: as the class.

        Raises:
            TypeError, ValueError: `linear` is not an nn.Linear with a float weight and torch's
                forward, or as the class. `linear` is as it was.
        """
        check_linear(linear)
        check_settings(r, lora_alpha, lora_dropout, bias, adapter_dtype, impl)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adapt(linear, r, lora_alpha, lora_dropout, use_rslora, bias, adapter_dtype, impl)
        layer.train(linear.training)
        return layer

    def _adapt(
        self,
        base: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        bias: str,
        adapter_dtype: torch.dtype | None,
        impl: str,
    ) -> None:
        like = {"device": base.weight.device, "dtype": adapter_dtype or base.weight.dtype}
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.use_rslora, self.bias_mode, self.impl = use_rslora, bias, impl
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, r, bias=False, **like)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, **like)
        # Moves with .to(), stays out of state_dict.
        self.register_buffer("_unmerged_weight", None, persistent=False)
        self.reset_lora_parameters()
        base.weight.requires_grad_(False)
        if base.bias is not None:
            base.bias.requires_grad_(bias != "none")

    @property
    def scaling(self) -> float:
        """The factor on the adapter branch."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, [out_features, in_features]."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, [out_features], or None."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the adapter's update."""
        return self._unmerged_weight is not None

    def reset_lora_parameters(self) -> None:
        """Draw lora_A as PEFT does (Kaiming uniform, a = sqrt(5)) and zero lora_B."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] for x [..., in_features]; see `lora_linear`."""
        if self.merged:
            return self.base_layer(x)
        weight, bias = self.base_layer.weight, self.base_layer.bias
        a, b, cast = self.lora_A.weight, self.lora_B.weight, autocast_dtype(x)
        check_lora_linear(x, weight, a, b, bias, cast=cast)
        p, packed = self.lora_dropout if self.training else 0.0, current(self, weight)
        return checked_lora_linear(
            x, weight, a, b, bias, self.scaling, p, None, self.impl, cast, packed
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Add scaling · B A to the base weight, in place; a second call changes nothing.

        A copy of the weight is kept until `unmerge`, so that it comes back bit for bit.
        Precision: the sum is formed in float32 (float64 for float64) and rounded once.
        """
        if self.merged:
            return
        weight = self.base_layer.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = self.lora_A.weight.to(wide), self.lora_B.weight.to(wide)
        merged = torch.addmm(weight.to(wide), b, a, alpha=self.scaling)
        self._unmerged_weight = weight.detach().clone()
        weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base weight its value from before `merge`; without a merge nothing changes."""
        if self._unmerged_weight is None:
            return
        self.base_layer.weight.copy_(self._unmerged_weight)
        self._unmerged_weight = None

    def extra_repr(self) -> str:
        """Say what the layer is: sizes, adapter settings, state."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, "
            f"use_rslora={self.use_rslora}, scaling={self.scaling:g}, bias={self.bias_mode!r}, "
            f"merged={self.merged}, impl={self.impl!r}"
        )


def check_linear(linear: nn.Module) -> None:
    """Raise TypeError unless `linear` computes x Wᵀ + bias from a float weight."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
    # A quantised layer is often a subclass; its forward would silently be bypassed.
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        raise TypeError(
            f"linear: expected torch.nn.Linear's own forward, got one of {type(linear).__name__}"
        )
    if linear.weight.dtype not in FLOAT_DTYPES:
        raise TypeError(
            "linear: expected a float16, bfloat16, float32 or float64 weight, "
            f"got {linear.weight.dtype}"
        )


def check_settings(
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    bias: str,
    adapter_dtype: torch.dtype | None,
    impl: str,
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless LoRALinear takes the settings."""
    check_rank(r)
    check_finite(lora_alpha, name="lora_alpha")
    check_dropout_p(lora_dropout, name="lora_dropout")
    if bias not in BIAS_MODES:
        raise ValueError(f"bias: expected one of {', '.join(map(repr, BIAS_MODES))}, got {bias!r}")
    if adapter_dtype not in (None, *FLOAT_DTYPES):
        raise TypeError(
            "adapter_dtype: expected float16, bfloat16, float32, float64 or None, "
            f"got {adapter_dtype}"
        )
    check_impl(impl)

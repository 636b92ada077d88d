"""The adapted linear layer as a module; it holds parameters and owns no mathematics."""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_kernels import merging
from lora_kernels.bypass import everywhere_reason, input_reason, read_linear, scaling_reason
from lora_kernels.checks import (
    FLOAT_DTYPES,
    check_call,
    check_dropout_p,
    check_keyword,
    plainly_fit,
)
from lora_kernels.copies import Copies, current
from lora_kernels.merging import Update
from lora_kernels.nn.adapted import Adapted
from lora_kernels.nn.arguments import OWNER_READS, check_linear, check_settings, has_plain_matrix
from lora_kernels.nn.dora import Magnitude
from lora_kernels.norms import known_norm
from lora_kernels.operands.call import Adapter, LinearCall, autocast_dtype
from lora_kernels.operands.dora import DoraCall
from lora_kernels.operands.dropout import drawn
from lora_kernels.ops.dora import run as run_dora
from lora_kernels.ops.dora import run_with_norm
from lora_kernels.ops.linear import run
from lora_kernels.quantized import Base, apply, read_quantized, settled, unconverted
from lora_kernels.usage import Calls


class LoRALinear(Adapted):
    """A frozen linear layer with a trainable low-rank adapter::

        y = x Wᵀ + bias + scaling · D(x) Aᵀ Bᵀ
        scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

    Names are PEFT's: `base_layer` holds W and bias, `lora_A.weight` is [r, in_features],
    `lora_B.weight` is [out_features, r], with `use_dora` `lora_magnitude_vector.weight` is
    [out_features]. A call is fused unless it would bypass something: hooks, swapped submodules,
    weights that are computed or quantised; then the submodules are called.

    Args:
        in_features: K, the last dimension of x.
        out_features: N, the last dimension of y.
        r: rank, at least 1.
        lora_alpha: numerator of scaling, any finite number.
        lora_dropout: probability in [0, 1) of dropping an input of the adapter branch in training.
        use_rslora: divide lora_alpha by sqrt(r) instead of r.
        use_dora: rescale each row of W + scaling · B A to a learned length, as `lora_dora_linear`.
        bias: "none" freezes the base layer's bias; "all" and "lora_only" train it.
        base_bias: whether the base layer has a bias.
        device, dtype: of the base layer and the adapter.
        adapter_dtype: of lora_A and lora_B where it shall differ, such as float32 beside bfloat16.
        impl: as for `lora_linear`.

    Raises:
        TypeError, ValueError: an argument outside what is said above.

    Precision: as `lora_linear`; float32 adapters beside a 16-bit base are rounded to its dtype on
    load and get float32 gradients.

    Source: Hu et al., LoRA, arXiv:2106.09685; rsLoRA: arXiv:2312.03732.

    Example:
        >>> layer = lk.LoRALinear(64, 128, r=16, lora_alpha=32, lora_dropout=0.05)
        >>> layer.scaling, [n for n, p in layer.named_parameters() if p.requires_grad]
        (2.0, ['lora_A.weight', 'lora_B.weight'])
        >>> layer(torch.ones(3, 5, 64)).shape
        torch.Size([3, 5, 128])
    """

    base_layer: nn.Linear
    _lora_kernels_op = "lora_linear"
    lora_magnitude_vector: Magnitude  # with use_dora
    _lora_kernels_packed: Copies | None = None  # set by `prepack_` and `cast_weights_`

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *misplaced: NoReturn,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        bias: str = "none",
        base_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> None:
        check_keyword("r", misplaced)
        check_settings(r, lora_alpha, lora_dropout, bias, adapter_dtype, impl)
        base = nn.Linear(in_features, out_features, bias=base_bias, device=device, dtype=dtype)
        super().__init__()
        self._adapt(base, r, lora_alpha, lora_dropout, use_rslora, bias, adapter_dtype, impl)
        if use_dora:
            self.lora_magnitude_vector = Magnitude(self)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *misplaced: NoReturn,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        bias: str = "none",
        adapter_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> "LoRALinear":
        """Return a layer around `linear`: the same object becomes `base_layer` and is frozen.

        Args:
            linear: the layer to adapt; its device and dtype are the adapter's. Beside a quantised
                weight, one that `quantized_weight` reads, lora_A and lora_B are float32.
            r, lora_alpha, lora_dropout, use_rslora, use_dora, bias, adapter_dtype, impl: as the
                class; use_dora beside a float weight only.

        Raises:
            TypeError, ValueError: `linear` is neither an nn.Linear with a plain float weight and
                torch's forward nor a quantised layer, or it is MultiheadAttention's out_proj and
                lora_dropout isn't 0; or as the class. `linear` is as it was.

        Example:
            >>> linear = nn.Linear(64, 128)
            >>> layer = lk.LoRALinear.from_linear(linear, r=16)
            >>> layer.base_layer is linear, linear.weight.requires_grad
            (True, False)
        """
        check_keyword("r", misplaced)
        check_settings(r, lora_alpha, lora_dropout, bias, adapter_dtype, impl)
        check_linear(linear, lora_dropout, bias, use_dora)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adapt(linear, r, lora_alpha, lora_dropout, use_rslora, bias, adapter_dtype, impl)
        if use_dora:
            layer.lora_magnitude_vector = Magnitude(layer)
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
        # As PEFT has it; codes may be kept as float16.
        own = torch.float32 if isinstance(read_quantized(base), Base) else base.weight.dtype
        like = {"device": base.weight.device, "dtype": adapter_dtype or own}
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.use_rslora, self.bias_mode, self.impl = use_rslora, bias, impl
        self.base_layer = base
        self._lora_kernels_calls = Calls()
        self.lora_A = nn.Linear(base.in_features, r, bias=False, **like)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, **like)
        self.reset_lora_parameters()
        base.requires_grad_(False)  # what a computed weight is computed from, too
        if base.bias is not None and bias != "none":
            base.bias.requires_grad_()

    @property
    def use_dora(self) -> bool:
        """Whether rows are rescaled to a learned length."""
        return "lora_magnitude_vector" in self._modules

    @property
    def weight(self) -> Tensor:
        """W + scaling · B A, [out_features, in_features], formed at each reading; DoRA's rescaled.

        For owners that multiply by their submodules' weights, such as MultiheadAttention: gradients
        reach lora_A and lora_B. W itself is `base_layer.weight`; it is what is returned, too, where
        the layer is merged or no sum can be formed (a quantised weight, an emptied one).

        Raises:
            RuntimeError: around MultiheadAttention's out_proj, where the sum isn't what the layer
                computes: no sum can be formed, or dropout is on.
        """
        modules = (self.base_layer, self.lora_A, self.lora_B)
        weight = self.base_layer.weight
        if self.merged:
            return weight
        summable = all(map(has_plain_matrix, modules))
        if isinstance(self.base_layer, NonDynamicallyQuantizableLinear):
            if not summable:
                raise RuntimeError("weight: expected plain matrices to form W + scaling · B A of")
            if self.training and self.lora_dropout:
                raise RuntimeError(f"lora_dropout: {OWNER_READS}, got {self.lora_dropout}")
        if not summable:
            return weight
        return merging.with_updates(weight, self._update_of(weight))

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, [out_features], or None."""
        return self.base_layer.bias

    def reset_lora_parameters(self) -> None:
        """Draw lora_A as PEFT does (Kaiming uniform, a = sqrt(5)) and zero lora_B.

        The magnitude of DoRA becomes the length of W's rows.
        """
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        if self.use_dora:
            self.lora_magnitude_vector.reset(self)

    def forward(
        self,
        x: Tensor = None,  # type: ignore[assignment]
        input: Tensor = None,  # type: ignore[assignment]  # noqa: A002
    ) -> Tensor:
        """Return y [..., out_features] for x [..., in_features]; see `lora_linear`.

        input: x, under the name that nn.Linear has for it; by name (the ONNX exporter of traces
            passes defaults by position).
        """
        x = input if x is None else x
        if self._merged_updates:
            return self.base_layer(x)
        parts = self._fused_parts()
        if isinstance(parts, str):
            # In this order: inside transforms codes have no memory, and traces no name for them.
            reason = everywhere_reason()
            base = None if reason is not None else read_quantized(self.base_layer)
            return self._left(x, reason or parts) if base is None else self._quantized(x, base)
        weight, bias, a, b = parts[:4]
        cast, scaling, p = autocast_dtype(x), self.scaling, self.lora_dropout
        call = LinearCall(current(self, weight), Adapter(a, b, scaling), bias, None)
        if not plainly_fit(x, call, cast):
            reason = input_reason(x)
            if reason is not None:
                return self._left(x, reason)
            check_call(x, call, cast=cast)
        p = 0.0 if p == 0.0 or not self.training else p  # compiled without dropout: for both modes
        if type(scaling) is not float or scaling - scaling != 0.0:
            reason = scaling_reason(scaling)
            if reason is not None:
                return self._left(x, reason)
        if type(p) is not float or not 0.0 <= p < 1.0:
            check_dropout_p(p, name="lora_dropout")
        # A counter would be one of the things that a compiled graph depends on.
        if not is_dynamo_compiling():
            calls = self._lora_kernels_calls
            calls.fused, calls.autocast = calls.fused + 1, cast or calls.autocast
        if p:
            call = call._replace(dropout=drawn(p, None, x.device))
        if len(parts) == 5:
            dora = DoraCall(call, parts[4])
            norm = known_norm(self, weight, dora, self.impl, cast or x.dtype)
            if norm is not None:
                return run_with_norm(x, dora, norm, self.impl, cast)
            return run_dora(x, dora, self.impl, cast)
        return run(x, call, self.impl, cast)

    def left_reason(self) -> str | None:
        """Return why a call would be composed of the submodules' own; None where it is fused."""
        parts = self._fused_parts(read_quantized(self.base_layer))
        return parts if isinstance(parts, str) else None

    def _fused_parts(self, quantized: Base | str | None = None) -> tuple[Any, ...] | str:
        """Return W, bias, A, B and DoRA's magnitude for a fused call, or what it would bypass.

        quantized: the base layer, where it is read already.
        """
        modules: dict[str, Any] = self._modules
        base = read_linear(modules["base_layer"]) if quantized is None else quantized
        a, b = read_linear(modules["lora_A"]), read_linear(modules["lora_B"])
        if isinstance(base, str):
            return f"base layer {base}"
        if isinstance(a, str):
            return f"lora_A {a}"
        if isinstance(b, str):
            return f"lora_B {b}"
        if a[1] is not None or b[1] is not None:
            return "lora_A or lora_B has a bias"
        reason = everywhere_reason()
        if reason is not None:
            return reason
        magnitude = modules.get("lora_magnitude_vector")
        if magnitude is None:
            return base[0], base[1], a[0], b[0]
        m = magnitude.read(base[0])
        return m if isinstance(m, str) else (base[0], base[1], a[0], b[0], m)

    def _quantized(self, x: Tensor, base: Base | str) -> Tensor:
        """Return y around a quantised base layer."""
        parts = self._fused_parts(base)
        unfit = input_reason(x) or scaling_reason(self.scaling)
        if isinstance(base, str) or isinstance(parts, str) or unfit is not None:
            return self._left(x, parts if isinstance(parts, str) else str(unfit))
        p = self.lora_dropout if self.training else 0.0
        check_dropout_p(p, name="lora_dropout")
        if not is_dynamo_compiling():
            self._lora_kernels_calls.fused += 1
        dropout = drawn(p, None, x.device) if p else None
        base = settled(self.base_layer, base, x)
        return apply(x, base, Adapter(parts[2], parts[3], self.scaling), dropout, self.impl)

    def _left(self, x: Tensor, reason: str) -> Tensor:
        """Return y by the submodules' own calls, as PEFT computes it, and note the reason."""
        if not is_dynamo_compiling():
            self._lora_kernels_calls.leave(reason)
        with unconverted(self.base_layer):
            y = self.base_layer(x)
        dtype = getattr(getattr(self.lora_A, "weight", None), "dtype", None)
        if isinstance(dtype, torch.dtype) and dtype in FLOAT_DTYPES:
            x = x.to(dtype)
        dropped = nn.functional.dropout(x, self.lora_dropout, self.training)
        if self.use_dora:
            return self.lora_magnitude_vector(self, y, dropped)
        return (y + self.lora_B(self.lora_A(dropped)) * self.scaling).to(y.dtype)

    def _update_of(self, weight: Tensor) -> Update:
        """Return what the adapter makes of a weight, as it is now."""
        gain = self.lora_magnitude_vector.gain(self, weight) if self.use_dora else None
        return Update(self.lora_A.weight, self.lora_B.weight, self.scaling, gain)

    def _updates(self) -> tuple[Update, ...]:
        a, b = (merging.own_weight(getattr(self, n), n) for n in ("lora_A", "lora_B"))
        if self.lora_A.bias is not None or self.lora_B.bias is not None:
            raise TypeError("lora_A, lora_B: expected no bias to merge, got one")
        update = self._update_of(merging.unmerged(self.base_layer))
        return (update._replace(lora_A=a.detach().clone(), lora_B=b.detach().clone()),)

    def extra_repr(self) -> str:
        """Say what the layer is: sizes, adapter settings, state."""
        dora = "use_dora=True, " if self.use_dora else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, "
            f"use_rslora={self.use_rslora}, {dora}scaling={self.scaling:g}, "
            f"bias={self.bias_mode!r}, merged={self.merged}, impl={self.impl!r}"
        )

"""The adapted convolutions as modules; they hold parameters and own no mathematics."""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_kernels import merging
from lora_kernels.bypass import everywhere_reason, input_reason, read_plain
from lora_kernels.checks import check_keyword
from lora_kernels.merging import Update
from lora_kernels.nn.adapted import Adapted
from lora_kernels.nn.arguments import check_settings
from lora_kernels.ops.conv import lora_conv1d, lora_conv2d, lora_conv3d
from lora_kernels.usage import Calls

_Kind = nn.Conv1d | nn.Conv2d | nn.Conv3d


_TEXT = """A frozen {dims}-dimensional convolution with a trainable low-rank adapter::

        y = conv(x, W) + bias + scaling · conv(conv(D(x), A), B)

    Names are PEFT's: `base_layer` holds W and bias, `lora_A` has its kernel, stride and padding and
    r channels out, `lora_B` a kernel of 1 and its groups.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, groups: as torch's convolution has
            them.
        r: rank, a multiple of groups.
        lora_alpha: numerator of scaling, any finite number.
        lora_dropout: probability in [0, 1) of dropping an input of the adapter branch in training.
        use_rslora: divide lora_alpha by sqrt(r) instead of r.
        bias: "none" freezes the base layer's bias; "all" and "lora_only" train it.
        base_bias: whether the base layer has a bias.
        device, dtype: of the base layer and the adapter.
        adapter_dtype: of lora_A and lora_B where it shall differ, such as float32 beside bfloat16.
        impl: as for `lora_conv{n}d`.

    Raises:
        TypeError, ValueError: an argument outside what is said above.

    Source: Hu et al., LoRA, arXiv:2106.09685; PEFT for convolutions.

    Example:
        >>> layer = lk.LoRAConv{n}d(4, 6, 3, padding=1, r=2, lora_dropout=0.1)
        >>> layer(torch.ones(1, 4, *[5] * {n})).shape[:3]
        torch.Size([1, 6, 5])
    """


class _LoRAConv(Adapted):
    """A frozen convolution with a trainable low-rank adapter, in any number of dimensions."""

    base_layer: Any
    _lora_kernels_op = "lora_conv"
    _kind: type[_Kind]
    _function: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        groups: int = 1,
        *misplaced: NoReturn,
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
        check_keyword("r", misplaced)
        check_settings(r, lora_alpha, lora_dropout, bias, adapter_dtype, impl)
        base = self._kind(
            in_channels, out_channels, kernel_size, stride, padding,
            groups=groups, bias=base_bias, device=device, dtype=dtype,
        )  # fmt: skip
        _check_rank(base, r)
        super().__init__()
        self._adapt(base, r, lora_alpha, lora_dropout, use_rslora, bias, adapter_dtype, impl)

    @classmethod
    def from_conv(
        cls,
        conv: _Kind,
        *misplaced: NoReturn,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: str = "none",
        adapter_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> "_LoRAConv":
        """Return a layer around `conv`: the same object becomes `base_layer` and is frozen.

        Args:
            conv: the layer to adapt; its device and dtype are the adapter's.
            r, lora_alpha, lora_dropout, use_rslora, bias, adapter_dtype, impl: as the class.

        Returns:
            The layer.

        Raises:
            TypeError, ValueError: `conv` is not torch's own layer of this many dimensions with a
                plain float weight, has dilation or padding other than by zeros, which PEFT's
                adapter lacks, or groups that don't divide r; or as the class. `conv` is as it was.

        Example:
            >>> conv = nn.Conv2d(4, 6, 3, padding=1)
            >>> lk.LoRAConv2d.from_conv(conv, r=2).base_layer is conv
            True
        """
        check_keyword("r", misplaced)
        check_settings(r, lora_alpha, lora_dropout, bias, adapter_dtype, impl)
        check_conv(conv, cls._kind, r)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adapt(conv, r, lora_alpha, lora_dropout, use_rslora, bias, adapter_dtype, impl)
        layer.train(conv.training)
        return layer

    def _adapt(
        self,
        base: _Kind,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        bias: str,
        adapter_dtype: torch.dtype | None,
        impl: str,
    ) -> None:
        like: dict[str, Any] = {
            "device": base.weight.device,
            "dtype": adapter_dtype or base.weight.dtype,
        }
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.use_rslora, self.bias_mode, self.impl = use_rslora, bias, impl
        self.base_layer = base.requires_grad_(False)
        self._lora_kernels_calls = Calls()
        # Which class it is, and so its tuples, mypy can't know.
        make: Any = self._kind
        self.lora_A = make(
            base.in_channels, r, base.kernel_size, base.stride, base.padding, bias=False, **like
        )
        self.lora_B = make(r, base.out_channels, 1, groups=base.groups, bias=False, **like)
        self.reset_lora_parameters()
        if base.bias is not None and bias != "none":
            base.bias.requires_grad_()

    def reset_lora_parameters(self) -> None:
        """Draw lora_A as PEFT does (Kaiming uniform, a = sqrt(5)) and zero lora_B."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return y for x [N, C, ...] or [C, ...]; see `lora_conv2d`."""
        base = self.base_layer
        if self.merged:
            return base(x)
        reason = self.left_reason() or input_reason(x)
        self._note(reason)
        if reason is None:
            return self._function(
                x, base.weight, self.lora_A.weight, self.lora_B.weight, base.bias,
                scaling=self.scaling, stride=base.stride, padding=base.padding, groups=base.groups,
                dropout_p=self.lora_dropout, training=self.training, impl=self.impl,
            )  # fmt: skip
        y = base(x)
        x = x.to(self.lora_A.weight.dtype)
        dropped = nn.functional.dropout(x, self.lora_dropout, self.training)
        return (y + self.lora_B(self.lora_A(dropped)) * self.scaling).to(y.dtype)

    def left_reason(self) -> str | None:
        """Return why a call would be composed of the submodules' own; None where it is fused."""
        for name in ("base_layer", "lora_A", "lora_B"):
            reason = _reason(getattr(self, name), self._kind)
            if reason is not None:
                return f"{name} {reason}"
        if self.lora_A.bias is not None or self.lora_B.bias is not None:
            return "lora_A or lora_B has a bias"
        return everywhere_reason()

    def _updates(self) -> tuple[Update, ...]:
        if self.base_layer.groups > 1:
            raise ValueError(
                f"base_layer: expected one group to merge, got {self.base_layer.groups}"
            )
        a, b = (merging.own_weight(getattr(self, n), n) for n in ("lora_A", "lora_B"))
        if self.lora_A.bias is not None or self.lora_B.bias is not None:
            raise TypeError("lora_A, lora_B: expected no bias to merge, got one")
        a, b = (t.detach().flatten(1).clone() for t in (a, b))
        return (Update(a, b, self.scaling),)


class LoRAConv1d(_LoRAConv):
    __doc__ = _TEXT.format(dims="one", n=1)
    _kind = nn.Conv1d
    _function = staticmethod(lora_conv1d)


class LoRAConv2d(_LoRAConv):
    __doc__ = _TEXT.format(dims="two", n=2)
    _kind = nn.Conv2d
    _function = staticmethod(lora_conv2d)


class LoRAConv3d(_LoRAConv):
    __doc__ = _TEXT.format(dims="three", n=3)
    _kind = nn.Conv3d
    _function = staticmethod(lora_conv3d)


def check_conv(conv: _Kind, kind: type[_Kind], r: int) -> None:
    """Raise TypeError or ValueError unless a convolution can be adapted with a rank."""
    reason = _reason(conv, kind)
    if reason is not None:
        raise TypeError(
            f"conv: expected a torch.nn.{kind.__name__} to adapt, got one that {reason}"
        )
    _check_rank(conv, r)


def _check_rank(conv: _Kind, r: int) -> None:
    if r % conv.groups:
        raise ValueError(f"r: expected a multiple of groups, {conv.groups}, got {r}")


def _reason(conv: nn.Module, kind: type[_Kind]) -> str | None:
    """Return why the functions don't compute what a layer does, with PEFT's adapter; or None."""
    read = read_plain(conv, kind)
    if isinstance(read, str):
        return read
    if any(d != 1 for d in conv.dilation):  # type: ignore[union-attr]
        return f"has dilation {conv.dilation}, which PEFT's adapter lacks"
    if conv.padding_mode != "zeros":
        return f"has padding_mode {conv.padding_mode!r}, which PEFT's adapter lacks"
    return None

"""PEFT's LoRA convolutions with a fused forward; imported only when a model is patched."""

from collections.abc import Callable
from functools import partial
from typing import Any

from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, _ConvNd
from torch import Tensor, nn

from lora_kernels._peft.fused import Fused, active_adapter, path_of
from lora_kernels.bypass import (
    dropout_reason,
    everywhere_reason,
    read_plain,
    scaling_reason,
    tensors_reason,
)
from lora_kernels.dispatch import slower_than_peft
from lora_kernels.operands.call import Adapter, LinearCall, autocast_dtype
from lora_kernels.operands.conv import Geometry
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.request import Request
from lora_kernels.operands.weight import Dense
from lora_kernels.ops.conv import geometry_of, op_of, run
from lora_kernels.ops.conv_operators import check


class _FusedConv(Fused):
    """A convolution of PEFT's, computed by `lora_conv` unless there is a reason not to."""

    _lora_kernels_op = "lora_conv"
    _kind: type[nn.Module]

    def _lora_kernels_left(self) -> str | None:
        parts = fused_parts(self, self._kind)
        return parts if isinstance(parts, str) else None

    def _fused_call(self, x: Any, impl: str) -> Callable[[], Tensor] | str:
        layer: Any = self
        parts = fused_parts(layer, self._kind)
        if isinstance(parts, str):
            return parts
        call, geometry, p = parts
        weight, (a, b, _) = call.weight.decode(), call.adapter
        reason = tensors_reason(x=x, weight=weight, lora_A=a, lora_B=b)
        if reason is not None:
            return reason
        cast = autocast_dtype(x)
        try:
            check(x, call, geometry, cast)
        except (TypeError, ValueError) as error:
            return str(error)  # an unbatched x among them
        if p and impl == "auto":
            op, dtype = op_of(x, call, geometry), cast or x.dtype
            reason = slower_than_peft(Request(op, x.device, dtype, a.shape[0], True))
            if reason is not None:
                return reason
        if p:
            call = call._replace(dropout=drawn(p, None, x.device))
        return partial(run, x, call, geometry, impl, cast, path_of(layer))


class FusedConv1d(_FusedConv, Conv1d):
    """PEFT's `lora.Conv1d`, computed by `lora_conv1d` unless there is a reason not to."""

    _lora_kernels_theirs = Conv1d
    _kind = nn.Conv1d


class FusedConv2d(_FusedConv, Conv2d):
    """PEFT's `lora.Conv2d`, computed by `lora_conv2d` unless there is a reason not to."""

    _lora_kernels_theirs = Conv2d
    _kind = nn.Conv2d


class FusedConv3d(_FusedConv, Conv3d):
    """PEFT's `lora.Conv3d`, computed by `lora_conv3d` unless there is a reason not to."""

    _lora_kernels_theirs = Conv3d
    _kind = nn.Conv3d


def fused_parts(layer: Any, kind: type[nn.Module]) -> tuple[LinearCall, Geometry, float] | str:
    """Return a call without dropout, its geometry and dropout's probability, or a reason.

    The reason why the layer keeps PEFT's forward in its present state.
    """
    name, reason = active_adapter(layer, layer.lora_A, _ConvNd.forward)
    if name is None:
        return str(reason)
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    lora_A, lora_B, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    reads: list[Any] = [read_plain(module, kind) for module in (base, lora_A, lora_B)]
    for owner, read in zip(("base layer", "lora_A", "lora_B"), reads, strict=True):
        if isinstance(read, str):
            return f"{owner} {read}"
    if any(d != 1 for d in base.dilation):
        return f"base layer has dilation {base.dilation}, which PEFT's adapter loses (peft#3697)"
    if base.padding_mode != "zeros":
        return f"base layer has padding_mode {base.padding_mode!r}, which PEFT's adapter loses"
    (weight, bias), (a, bias_a), (b, bias_b) = reads
    if bias_a is not None or bias_b is not None:
        return "lora_A or lora_B has a bias"
    if a.dtype != b.dtype:
        return f"lora_A is {a.dtype}, lora_B {b.dtype}"
    if (lora_A.stride, lora_A.padding) != (base.stride, base.padding):
        return "lora_A has a stride or padding other than the base layer's"
    reason = dropout_reason(dropout) or everywhere_reason() or scaling_reason(scaling)
    if reason is not None:
        return reason
    try:
        geometry = geometry_of(
            len(base.stride), base.stride, base.padding, base.groups, base.kernel_size
        )
    except ValueError as error:
        return f"base layer has {error}"
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return LinearCall(Dense(weight), Adapter(a, b, scaling), bias, None), geometry, p

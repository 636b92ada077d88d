"""The operators of `lora_conv1d`, `lora_conv2d`, `lora_conv3d`: schemas, fakes, checks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.checks import (
    is_dtensor,
    not_a_float_tensor,
)
from lora_kernels.dispatch import IMPLEMENTATIONS
from lora_kernels.impl.convolution import memory_format
from lora_kernels.impl.reference import conv as reference
from lora_kernels.operands.call import Adapter, LinearCall, Wanted, as_autocast
from lora_kernels.operands.conv import Geometry, branch_dtype, conv_call_of, flat
from lora_kernels.ops.conv_gradients import ConvParams, LoraConv
from lora_kernels.registration import (
    Direction,
    Operators,
    as_results,
    below_autograd,
    is_recorded,
    operators,
    register,
)

_ADAPTER = "Tensor lora_A, Tensor lora_B"
_REST = (
    "Tensor? seed, int threshold, Tensor? scaling_tensor, float scaling, int[] stride, "
    "int[] padding, int groups"
)
_FORWARD = f"(Tensor x, Tensor weight, {_ADAPTER}, Tensor? bias, {_REST}) -> (Tensor y, Tensor xa)"
_BACKWARD = (
    f"(Tensor dy, Tensor? x, Tensor? xa, SymInt[] size, Tensor weight, {_ADAPTER}, {_REST}, "
    "bool[4] wanted) -> (Tensor dx, Tensor da, Tensor db, Tensor dbias)"
)


def check(
    x: Any, call: LinearCall, geometry: Geometry, cast: torch.dtype | None, of: str = "x"
) -> None:
    """Check the tensors of a call against each other; of backward x is dy, without channels."""
    weight, (a, b, _), bias, dims = call.weight.decode(), call.adapter, call.bias, geometry.stride
    named: list[tuple[str, Any]] = [("weight", weight), ("lora_A", a), ("lora_B", b)]
    for name, t in ((of, x), *named, *([] if bias is None else [("bias", bias)])):
        error = not_a_float_tensor(name, t, x, of)
        if error is not None:
            raise error
        if is_dtensor(t):
            raise TypeError(f"{name}: expected a plain tensor, got a DTensor")
        if t is not bias and t.ndim != len(dims) + 2:
            raise ValueError(
                f"{name}: expected {len(dims) + 2} dimensions, got shape {list(t.shape)}"
            )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype and (cast is None or t.dtype == torch.float64):
            raise TypeError(f"{name}: expected the dtype of {of}, {x.dtype}, got {t.dtype}")
    (out, per_group, *kernel), r, groups = weight.shape, a.shape[0], geometry.groups
    channels = per_group * groups
    if groups < 1 or out % groups or r % groups or r < 1:
        raise ValueError(
            f"groups: expected a divisor of out_channels {out} and of the rank {r}, got {groups}"
        )
    for name, t, shape in (
        ("lora_A", a, [r, channels, *kernel]),
        ("lora_B", b, [out, r // groups, *[1] * len(kernel)]),
        ("bias", bias, [out]),
    ):
        if t is not None and list(t.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(t.shape)}")
    wanted = channels if of == "x" else out
    if x.shape[1] != wanted:
        raise ValueError(f"{of}: expected {wanted} channels, got shape {list(x.shape)}")


def _check_forward(x: Tensor, *given: Any) -> None:
    check(x, *conv_call_of(*given), cast=None)


def _backward_call(weight: Tensor, a: Tensor, b: Tensor, *rest: Any) -> tuple[LinearCall, Geometry]:
    return conv_call_of(weight, a, b, None, *rest)


def _check_backward(dy: Tensor, x: Any, xa: Any, size: Any, *given: Any) -> None:
    call, geometry = _backward_call(*given[:-1])
    check(dy, call, geometry, cast=None, of="dy")
    weight, a = call.weight.decode(), call.adapter.a
    n, spatial = dy.shape[0], [*dy.shape[2:]]
    if [*size[:2]] != [n, a.shape[1]] or _sizes(size[2:], weight.shape[2:], geometry) != spatial:
        raise ValueError(f"size: expected that of an x whose y is {[*dy.shape]}, got {[*size]}")
    for name, t, shape in (("x", x, [*size]), ("xa", xa, [n, a.shape[0], *spatial])):
        if t is not None and [*t.shape] != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {[*t.shape]}")


def _sizes(spatial: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> list[int]:
    stride, padding, _ = geometry
    return [
        (n + 2 * p - k) // s + 1
        for n, k, s, p in zip(spatial, kernel, stride, padding, strict=True)
    ]


def _fake_forward(impl: str, x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    _check_forward(x, *given)
    call, geometry = conv_call_of(*given)
    weight, a = call.weight.decode(), call.adapter.a
    sizes = _sizes(x.shape[2:], weight.shape[2:], geometry)
    dtypes = ((weight.shape[0], x.dtype), (a.shape[0], branch_dtype(x, call.adapter)))
    y, xa = (
        torch.empty(
            (x.shape[0], channels, *sizes),
            dtype=dtype,
            device=x.device,
            memory_format=memory_format(x, weight),
        )
        for channels, dtype in dtypes
    )
    return y, xa


def _fake_backward(
    impl: str, dy: Tensor, x: Any, xa: Any, size: Any, weight: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    _check_backward(dy, x, xa, size, weight, *given)
    a, b, *_, wanted = given
    form = memory_format(dy, weight)
    results = (
        torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=form),
        torch.empty_like(a, memory_format=torch.contiguous_format),
        torch.empty_like(b, memory_format=torch.contiguous_format),
        dy.new_empty(dy.shape[1]),
    )
    return tuple(t if want else dy.new_empty(0) for want, t in zip(wanted, results, strict=True))


def _compute(impl: str, forward: Any, x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    _check_forward(x, *given)
    call, geometry = conv_call_of(*given)
    y, xa = forward(x, call, geometry)
    form = memory_format(x, call.weight.decode())
    return y.contiguous(memory_format=form), xa.contiguous(memory_format=form)


def _compute_gradients(
    impl: str, backward: Any, dy: Tensor, x: Any, xa: Any, size: Any, *given: Any
) -> tuple[Tensor, ...]:
    _check_backward(dy, x, xa, size, *given)
    *flat_call, wanted = given
    call, geometry = _backward_call(*flat_call)
    dx, *others = backward(dy, (x, xa, list(size)), call, geometry, Wanted(*wanted))
    form = memory_format(dy, call.weight.decode())
    dx = dy.new_empty(0) if dx is None else dx.contiguous(memory_format=form)
    return dx, *as_results(dy, others)


def _cast_forward(impl: str, dtype: torch.dtype, x: Tensor, *given: Any) -> tuple[Any, ...]:
    call, geometry = conv_call_of(*given)
    return as_autocast(x, dtype), *flat(call.cast(dtype), geometry)


def _cast_backward(
    impl: str, dtype: torch.dtype, dy: Tensor, x: Any, xa: Any, size: Any, weight: Any, *given: Any
) -> tuple[Any, ...]:
    a, b = given[:2]
    cast = dy if dy.dtype == torch.float64 else dy.to(dtype)
    xa = as_autocast(xa, branch_dtype(cast, Adapter(a, b, 1.0)))
    return cast, as_autocast(x, dtype), xa, size, as_autocast(weight, dtype), *given


def _recorded_forward(both: Operators, x: Tensor, *given: Any) -> Any:
    return differentiable(both, x, *conv_call_of(*given))


def _recorded_backward(both: Operators, dy: Tensor, x: Any, xa: Any, size: Any, *given: Any) -> Any:
    """Be the backward operator's autograd kernel: torch's operators where it is recorded."""
    tensors = (dy, x, xa, *given[:3])
    if not is_recorded(*tensors):
        return below_autograd(both.backward, dy, x, xa, size, *given)
    *flat_call, wanted = given
    call, geometry = _backward_call(*flat_call)
    dx, *others = reference.backward(dy, (x, xa, list(size)), call, geometry, Wanted(*wanted))
    return dy.new_empty(0) if dx is None else dx, *as_results(dy, others)


register(
    "lora_conv",
    "conv",
    Direction(
        "forward", _FORWARD, _fake_forward, _compute, _check_forward, _cast_forward,
        _recorded_forward,
    ),
    Direction(
        "backward", _BACKWARD, _fake_backward, _compute_gradients, _check_backward, _cast_backward,
        _recorded_backward,
    ),
)  # fmt: skip
OPERATORS = {i.name: operators("lora_conv", i.name) for i in IMPLEMENTATIONS}


def differentiable(
    both: Operators, x: Tensor, call: LinearCall, geometry: Geometry, layer: str = ""
) -> tuple[Tensor, Tensor]:
    """Return y and xa by an implementation's operators, with gradients where they are wanted.

    layer: the layer's path, which an error in backward names.
    """
    weight, a, b, bias, seed, threshold, tensor, number, *_ = flat(call, geometry)
    if not is_recorded(x, weight, a, b, bias):
        return below_autograd(both.forward, x, *flat(call, geometry))
    params = ConvParams(both, threshold, number, geometry, layer)
    return LoraConv.apply(x, weight, a, b, bias, seed, tensor, params)

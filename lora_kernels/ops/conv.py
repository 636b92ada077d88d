"""`lora_conv1d`, `lora_conv2d`, `lora_conv3d`: what may be passed, and by which products."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.checks import check_dropout_p, check_scaling, check_seed
from lora_kernels.dispatch import check_impl, choose
from lora_kernels.impl.reference import conv as reference
from lora_kernels.operands.call import Adapter, LinearCall, autocast_dtype, scaling_for
from lora_kernels.operands.conv import Geometry
from lora_kernels.operands.dropout import drawn
from lora_kernels.operands.weight import Dense
from lora_kernels.ops.conv_operators import OPERATORS, check, differentiable
from lora_kernels.ops.linear import run as run_linear
from lora_kernels.ops.plain_torch import is_plain_torch


def run(
    x: Tensor,
    call: LinearCall,
    geometry: Geometry,
    impl: str,
    cast: torch.dtype | None = None,
    layer: str = "",
) -> Tensor:
    """Compute a call whose tensors are known to fit each other; modules come in here.

    cast: `autocast_dtype(x)`. layer: the layer's path, which an error in backward names.
    """
    if is_plain_torch(impl):
        if cast is not None:
            x, call = x.to(cast), call.cast(cast)
        return reference.forward(x, call, geometry)[0]
    if op_of(x, call, geometry) == "lora_linear":
        return run_linear(x.movedim(1, -1), _matrices(call), impl, cast, layer).movedim(-1, 1)
    if cast is not None:
        x, call = x.to(cast), call.cast(cast)
    rank, dropout = call.adapter.a.shape[0], call.dropout is not None
    asked = ("lora_conv", x.device, x.dtype, rank, dropout, call.weight.format)
    return differentiable(OPERATORS[choose(impl, asked).name], x, call, geometry, layer)[0]


def op_of(x: Tensor, call: LinearCall, geometry: Geometry) -> str:
    """Return the op whose kernels compute a call: the linear layer's where it is one, as x lies."""
    stride, padding, groups = geometry
    is_linear = (
        groups == 1
        and all(k == 1 for k in (*call.weight.shape[2:], *stride))
        and not any(padding)
        and x.movedim(1, -1).is_contiguous()
    )
    return "lora_linear" if is_linear else "lora_conv"


def _matrices(call: LinearCall) -> LinearCall:
    """Return a call of kernel 1 as the linear layer's kernels take it."""
    (a, b, scaling), weight = call.adapter, call.weight.decode()
    adapter = Adapter(a.flatten(1), b.flatten(1), scaling)
    return call._replace(weight=Dense(weight.flatten(1)), adapter=adapter)


class _How(NamedTuple):
    """The arguments of a public function beside tensors."""

    stride: int | Sequence[int]
    padding: int | Sequence[int] | str
    groups: int
    dropout_p: float
    training: bool
    seed: int | Tensor | None
    impl: str


def _conv(dims: int, x: Tensor, call: LinearCall, how: _How) -> Tensor:
    """Check and compute a call, which has no dropout yet, in `dims` dimensions."""
    check_impl(how.impl)
    scaling = call.adapter.scaling
    # A graph that is compiled for any number has none to ask about.
    if type(scaling) is not float or scaling - scaling != 0.0:
        check_scaling(scaling)
    if type(how.dropout_p) is not float or not 0.0 <= how.dropout_p < 1.0:
        check_dropout_p(how.dropout_p)
    kernel = tuple(getattr(call.weight.decode(), "shape", ()))[2:]
    geometry = geometry_of(dims, how.stride, how.padding, how.groups, kernel)
    single = isinstance(x, Tensor) and x.ndim == dims + 1
    x = x[None] if single else x
    cast = autocast_dtype(x)
    check(x, call, geometry, cast)
    check_seed(how.seed, x.device)
    adapter = call.adapter._replace(scaling=scaling_for(scaling, x.device))
    call = call._replace(adapter=adapter)
    if how.training and how.dropout_p:
        call = call._replace(dropout=drawn(how.dropout_p, how.seed, x.device))
    y = run(x, call, geometry, how.impl, cast)
    return y[0] if single else y


def lora_conv2d(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    groups: int = 1,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Apply a two-dimensional convolution with a LoRA adapter, as PEFT has it::

        y = conv(x, W) + bias + scaling · conv(conv(D(x), A), B)

    A has W's kernel, stride and padding, B a kernel of 1. D is as `lora_linear`'s, on x with its
    channels last: its mask is `dropout_mask((N, *spatial, C), dropout_p, seed).movedim(-1, 1)`,
    whatever x's memory format. A convolution of kernel 1, stride 1 and groups 1 on an x whose
    channels are last in memory is computed by `lora_linear`'s kernels, without a copy.

    Args:
        x: [N, C, ...] or [C, ...], float16, bfloat16, float32 or float64.
        weight: [out, C / groups, kernel...], x's dtype. Frozen by convention.
        lora_A: [R, C, kernel...], R >= 1, any of the float dtypes.
        lora_B: [out, R / groups, 1...], likewise.
        bias: [out], x's dtype, or None.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA; a float or a 0-dim tensor
            that doesn't require grad.
        stride: an int, or one for each dimension.
        padding: zeros on both sides, an int or one for each dimension, "valid", or "same" for odd
            kernels with stride 1.
        groups: of W and B, as PEFT has them; A has none.
        dropout_p: probability in [0, 1), applied in steps of 1/65536.
        training: whether dropout is applied.
        seed: as for `lora_linear`.
        impl: "auto", "eager" or "reference", and for what `lora_linear`'s kernels compute its
            others. A named implementation serves the call or raises.

    Returns:
        y, [N, out, ...], in x's dtype and the memory format that torch's convolution gives.

    Dilation isn't offered, nor is padding by anything but zeros: PEFT's adapter has neither.

    Precision: each product rounds to x's dtype as the library's does, to which lora_A and lora_B
    are rounded first; the sum is rounded again. Beside float16 the branch of wider adapters is
    float32. Autocast is as for `lora_linear`. Saved for backward: x, xa and the seed, never a mask.

    Inside torch.func's transforms, forward-mode differentiation, traces and exports the call is
    made of torch's own operators, by the formulas of "reference".

    Raises:
        TypeError: an argument is not a dense tensor or number, or dtypes that can't be combined.
        ValueError: shapes, devices, ranges, or an `impl` that can't serve the call.

    Source: Hu et al., LoRA, arXiv:2106.09685; PEFT for convolutions.

    Example:
        >>> x, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
        >>> a, b = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1)
        >>> lk.lora_conv2d(x, weight, a, b, scaling=2.0)
        tensor([[[[27., 27.],
                  [27., 27.]]]])
    """
    call = LinearCall(Dense(weight), Adapter(lora_A, lora_B, scaling), bias, None)
    how = _How(stride, padding, groups, dropout_p, training, seed, impl)
    return _conv(2, x, call, how)


def lora_conv1d(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    groups: int = 1,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    call = LinearCall(Dense(weight), Adapter(lora_A, lora_B, scaling), bias, None)
    how = _How(stride, padding, groups, dropout_p, training, seed, impl)
    return _conv(1, x, call, how)


def lora_conv3d(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    groups: int = 1,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    call = LinearCall(Dense(weight), Adapter(lora_A, lora_B, scaling), bias, None)
    how = _How(stride, padding, groups, dropout_p, training, seed, impl)
    return _conv(3, x, call, how)


def _documented(dims: str, example: str) -> str:
    """Return lora_conv2d's text for another number of dimensions."""
    text, _, _ = (lora_conv2d.__doc__ or "").partition("    Example:")
    return f"{text.replace('two', dims)}    Example:\n{example}    "


lora_conv1d.__doc__ = _documented(
    "one",
    """
        >>> x, weight = torch.ones(1, 1, 4), torch.ones(1, 1, 3)
        >>> lk.lora_conv1d(x, weight, torch.ones(1, 1, 3), torch.ones(1, 1, 1), scaling=2.0)
        tensor([[[9., 9.]]])
""".lstrip("\n"),
)
lora_conv3d.__doc__ = _documented(
    "three",
    """
        >>> x, weight = torch.ones(1, 1, 3, 3, 3), torch.ones(1, 1, 3, 3, 3)
        >>> lk.lora_conv3d(x, weight, weight.clone(), torch.ones(1, 1, 1, 1, 1), scaling=2.0)
        tensor([[[[[81.]]]]])
""".lstrip("\n"),
)


def geometry_of(
    dims: int,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    groups: int,
    kernel: Sequence[int],
) -> Geometry:
    """Return a geometry of numbers alone, of what torch's convolutions take.

    Raises:
        TypeError, ValueError: numbers of another kind or range, or padding that isn't the same on
            both sides.
    """
    strides = _numbers("stride", stride, dims, 1)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding: expected numbers, 'same' or 'valid', got {padding!r}")
        if padding == "same" and not all(
            k % 2 and s == 1 for k, s in zip(kernel, strides, strict=True)
        ):
            raise ValueError(
                "padding: expected 'same' with odd kernels and stride 1 alone, got kernel "
                f"{list(kernel)}, stride {list(strides)}"
            )
        paddings = tuple(k // 2 for k in kernel) if padding == "same" else (0,) * dims
    else:
        paddings = _numbers("padding", padding, dims, 0)
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups: expected an int, got {type(groups).__name__}")
    return Geometry(strides, paddings, groups)


def _numbers(name: str, given: int | Sequence[int], dims: int, least: int) -> tuple[int, ...]:
    numbers = (given,) * dims if isinstance(given, int) else tuple(given)
    if len(numbers) != dims or any(
        isinstance(n, bool) or not isinstance(n, int) or n < least for n in numbers
    ):
        raise ValueError(f"{name}: expected {dims} ints, at least {least}, got {given!r}")
    return numbers

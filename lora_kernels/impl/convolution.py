"""Torch's convolutions by the number of dimensions, their gradients, and x as rows of channels."""

import torch
from torch import Tensor
from torch.nn import functional

from lora_kernels.operands.conv import Geometry

_CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the convolution of x [N, C, ...]."""
    stride, padding, groups = geometry
    return _CONVOLUTIONS[x.ndim](x, weight, bias, stride, padding, 1, groups)


def input_gradient(
    size: list[int], weight: Tensor, dy: Tensor, geometry: Geometry, x: Tensor | None = None
) -> Tensor:
    """Return the gradient of a convolution's input, of this size.

    x: the input, if it is at hand. Torch reads its shape and memory format alone, by which it
    chooses its products': one of another format than dy would have dy copied.
    """
    if x is None or x.dtype != dy.dtype:
        form = memory_format(dy, weight)
        x = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=form)
    return _gradients(dy, x, weight, geometry, (True, False, False))[0]


def weight_gradient(x: Tensor, weight: Tensor, dy: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of a convolution's weight, of which the shape is read."""
    return _gradients(dy, x, weight, geometry, (False, True, False))[1]


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    (stride, padding, groups), ones = geometry, [1] * len(geometry.stride)
    zeros = [0] * len(ones)
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, ones, False, zeros, groups, wanted
    )


def memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Return the format of a convolution's result, which torch chooses by both operands."""
    form = _CHANNELS_LAST.get(x.ndim)
    if form is not None and any(
        t.is_contiguous(memory_format=form) and not t.is_contiguous() for t in (x, weight)
    ):
        return form
    return torch.contiguous_format


def rows_of(x: Tensor) -> Tensor:
    """Return x [N, C, ...] as [N · ..., C]: a view where channels are last in memory."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows as a tensor of the other's shape, its channels last in memory."""
    return rows.view(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)

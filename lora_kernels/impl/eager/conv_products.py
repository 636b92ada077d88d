"""A convolution and its input's gradient: the library's, or on a CPU the matrix product that it is.

Kernels of size 1 with strides of 1 are products of channels, which stay where they lie: with
channels first one a sample, with channels last one of all rows. The library turns x and dy instead:
a step of a 1x1 layer in bfloat16 took twice the time. (2026-12-01, Xeon with AMX)
"""

import torch
from torch import Tensor
from torch.nn import functional

from lora_kernels.impl import convolution as library
from lora_kernels.impl.convolution import memory_format, rows_of
from lora_kernels.operands.conv import Geometry


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the convolution of x [N, C, ...], in its memory format."""
    if not _is_product(x, weight, geometry):
        return library.convolve(x, weight, bias, geometry)
    return _product(x, weight.flatten(1), bias, memory_format(x, weight))


def input_gradient(
    size: list[int], weight: Tensor, dy: Tensor, geometry: Geometry, x: Tensor | None = None
) -> Tensor:
    """Return the gradient of a convolution's input, of this size; x: see the library's."""
    if not _is_product(dy, weight, geometry):
        return library.input_gradient(size, weight, dy, geometry, x)
    return _product(dy, weight.flatten(1).t(), None, memory_format(dy, weight))


def _is_product(v: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    stride, padding, groups = geometry
    pointwise = weight.shape[2:].numel() == 1 and not any(padding) and set(stride) == {1}
    return pointwise and groups == 1 and v.is_cpu


def _product(v: Tensor, matrix: Tensor, bias: Tensor | None, form: torch.memory_format) -> Tensor:
    """Return matrix [O, C] times the channels of v [N, C, ...], plus bias."""
    n, _, *spatial = v.shape
    if form != torch.contiguous_format:
        rows = functional.linear(rows_of(v), matrix, bias)
        return rows.view(n, *spatial, len(matrix)).movedim(-1, 1)
    factors = matrix.expand(n, *matrix.shape), v.flatten(2)
    y = torch.bmm(*factors) if bias is None else torch.baddbmm(bias[:, None], *factors)
    return y.view(n, len(matrix), *spatial)

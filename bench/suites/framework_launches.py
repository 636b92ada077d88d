"""The launches that eager frameworks make for the layer, to be counted and predicted.

Products run `plain_gemm`, in ours' tiles where they are large; every other step is one of the
simple kernels at the end. Real library kernels differ in instructions; launches and unique bytes do
not. Adapters have x's dtype.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.impl.triton.launch import Options
from lora_kernels.impl.triton.plan import cost
from lora_kernels.impl.triton.plan.config import Config, Problem
from lora_kernels.impl.triton.plan.device import Device
from lora_kernels.impl.triton.tools.record import Launch

TILE = Config(128, 128, 64, 8, 3)
SMALL = 64  # a product of fewer rows or columns takes tiles of so many, and four warps
BLOCK, PASS_WARPS = 1024, 4
DROPOUT_P = 0.1


class Product(NamedTuple):
    """out [m, n] = u [m, k] v [k, n]; added: to what out holds. u or v may be stored transposed."""

    m: int
    n: int
    k: int
    u_transposed: bool = False
    v_transposed: bool = True
    added: bool = False


class Pass(NamedTuple):
    """A kernel over so many elements; tensors and masks: how many of each it reads or writes."""

    kernel: str
    elements: int
    tensors: int
    masks: int = 0


Step = Product | Pass


def plain(layer: Problem) -> list[Step]:
    """Return the frozen layer's own product: x Wᵀ, or dy W."""
    if layer.backward:
        return [Product(layer.m, layer.k, layer.n, v_transposed=False)]
    return [Product(layer.m, layer.n, layer.k)]


def peft(layer: Problem) -> list[Step]:
    """Return what PEFT's layer launches, forward or backward."""
    m, n, k, r = layer[:4]
    if not layer.backward:
        drop = [Pass("dropout", m * k, 2, 1)] if layer.dropout else []
        low_rank = [Product(m, r, k), Product(m, n, r)]
        return [*plain(layer), *drop, *low_rank, Pass("scale", m * n, 2), Pass("add", m * n, 3)]
    drop = [Pass("masked", m * k, 2, 1)] if layer.dropout else []
    return [
        Pass("scale", m * n, 2),
        Product(n, r, m, u_transposed=True, v_transposed=False),  # dB
        Product(m, r, n, v_transposed=False),  # dxa
        Product(r, k, m, u_transposed=True, v_transposed=False),  # dA
        Product(m, k, r, v_transposed=False),
        *drop,
        *plain(layer),
        Pass("add", m * k, 3),
    ]


def addmm(layer: Problem) -> list[Step]:
    """Return what the in-place addmm order launches, forward or backward; dropout is outside."""
    m, n, k, r = layer[:4]
    if not layer.backward:
        drop = [Pass("dropout", m * k, 2, 1)] if layer.dropout else []
        return [*drop, *plain(layer), Product(m, r, k), Product(m, n, r, added=True)]
    drop = [Pass("masked", m * k, 2, 1), Pass("add", m * k, 3)] if layer.dropout else []
    return [
        Product(m, r, n, v_transposed=False),  # dy B
        Product(r, k, m, u_transposed=True, v_transposed=False),  # dA
        Product(m, r, k),  # xa again
        Product(n, r, m, u_transposed=True, v_transposed=False),  # dB
        *plain(layer),
        Product(m, k, r, v_transposed=False, added=not layer.dropout),
        *drop,
    ]


def recorded(steps: list[Step]) -> Iterator[Launch]:
    """Yield the launches of steps, on bfloat16 tensors of random numbers."""
    for step in steps:
        yield _product(step) if isinstance(step, Product) else _pass(step)


def _product(step: Product) -> Launch:
    u, stride_um, stride_uk = _operand(step.m, step.k, step.u_transposed)
    v, stride_vk, stride_vn = _operand(step.k, step.n, step.v_transposed)
    out = torch.zeros(step.m, step.n, dtype=torch.bfloat16)
    args = {"u": u, "v": v, "out": out, "M": step.m, "N": step.n, "K": step.k}
    args |= {"stride_um": stride_um, "stride_uk": stride_uk}
    args |= {"stride_vn": stride_vn, "stride_vk": stride_vk, "stride_out": step.n}
    large = min(step.m, step.n) >= TILE.block_m
    rows = TILE.block_m if large else min(SMALL, _padded(step.m))
    columns = TILE.block_n if large else min(SMALL, _padded(step.n))
    depth = min(TILE.block_k, _padded(step.k))
    grid = -(-step.m // rows) * -(-step.n // columns)
    constants = {"ADD": step.added, "BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}
    how = Options(TILE.num_warps if large else PASS_WARPS, TILE.num_stages)
    return Launch(plain_gemm, grid, args, {**constants, "GROUP": 8}, how)


def _operand(rows: int, columns: int, transposed: bool) -> tuple[Tensor, int, int]:
    """Return a matrix of random numbers with its row and column strides."""
    if transposed:
        return torch.randn(columns, rows, dtype=torch.bfloat16), 1, rows
    return torch.randn(rows, columns, dtype=torch.bfloat16), columns, 1


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _pass(step: Pass) -> Launch:
    def tensor() -> Tensor:
        return torch.ones(step.elements, dtype=torch.bfloat16)

    mask = torch.ones(step.elements, dtype=torch.int8)
    kernels: dict[str, tuple[Any, dict[str, Any]]] = {
        "scale": (scale, {"x": tensor(), "out": tensor(), "factor": 2.0}),
        "add": (add, {"x": tensor(), "y": tensor(), "out": tensor()}),
        "dropout": (
            dropout,
            {"x": tensor(), "out": tensor(), "mask": mask, "p": DROPOUT_P, "seed": 7},
        ),
        "masked": (masked, {"x": tensor(), "mask": mask, "out": tensor(), "factor": 2.0}),
    }
    kernel, tensors = kernels[step.kernel]
    args, grid = {**tensors, "count": step.elements}, -(-step.elements // BLOCK)
    return Launch(kernel, grid, args, {"BLOCK": BLOCK}, Options(PASS_WARPS, 1))


def predicted_seconds(steps: list[Step], device: Device) -> float:
    """Return the time of steps by the cost model: a product of low rank by its bytes alone."""
    return sum(_predicted(step, device) for step in steps)


def _predicted(step: Step, device: Device) -> float:
    if isinstance(step, Pass):
        return (
            device.rates.launch_seconds
            + (2 * step.tensors + step.masks) * step.elements / device.bandwidth
        )
    m, n, k = step[:3]
    if min(m, n, k) >= TILE.block_m:
        return cost.frozen_seconds(Problem(m, n, k, 1, 16), device)
    moved = 2 * (m * k + k * n + m * n * (2 if step.added else 1))
    return device.rates.launch_seconds + moved / device.bandwidth


@triton.jit
def plain_gemm(
    u, v, out, M, N, K, stride_um, stride_uk, stride_vn, stride_vk, stride_out,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute out [M, N] = u [M, K] vᵀ with v [N, K], by strides, one tile a program.

    ADD: out's old values are added, as addmm does.
    """
    tile = tl.program_id(0)
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * columns) * GROUP
    high = tl.minimum(rows - first, GROUP)
    row = first + tile % (GROUP * columns) % high
    column = tile % (GROUP * columns) // high
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    u_pointers = u + (m % M)[:, None] * stride_um + k[None, :] * stride_uk
    v_pointers = v + (n % N)[None, :] * stride_vn + k[:, None] * stride_vk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        inside = k < K - step * BLOCK_K
        u_tile = tl.load(u_pointers, mask=inside[None, :], other=0.0)
        v_tile = tl.load(v_pointers, mask=inside[:, None], other=0.0)
        acc = tl.dot(u_tile, v_tile, acc)
        u_pointers += BLOCK_K * stride_uk
        v_pointers += BLOCK_K * stride_vk
    pointers = out + m[:, None] * stride_out + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if ADD:
        acc += tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def scale(x, out, factor, count, BLOCK: tl.constexpr):
    """Compute out = factor · x."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < count) * factor, mask=at < count)


@triton.jit
def add(x, y, out, count, BLOCK: tl.constexpr):
    """Compute out = x + y."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + at, mask=at < count) + tl.load(y + at, mask=at < count)
    tl.store(out + at, total, mask=at < count)


@triton.jit
def dropout(x, out, mask, p, seed, count, BLOCK: tl.constexpr):
    """Draw a mask of bytes, and compute out = x · mask / (1 - p); a Philox call serves four."""
    draws = tl.program_id(0) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.rand4x(seed, draws)
    keep = tl.interleave(tl.interleave(a, c), tl.interleave(b, d)) > p
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(x + at, mask=at < count) * keep * (1 / (1 - p))
    tl.store(out + at, kept.to(out.dtype.element_ty), mask=at < count)
    tl.store(mask + at, keep.to(tl.int8), mask=at < count)


@triton.jit
def masked(x, mask, out, factor, count, BLOCK: tl.constexpr):
    """Compute out = factor · x · mask."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(x + at, mask=at < count) * tl.load(mask + at, mask=at < count) * factor
    tl.store(out + at, kept.to(out.dtype.element_ty), mask=at < count)

"""The grouped LoRA linear by torch's grouped_mm: all groups at once, the host knows none of them.

Same equations and signatures as `reference`, for groups that each have a weight and an adapter of
their own. On GPUs from sm_90 up grouped_mm is one kernel, elsewhere a loop that waits for the
GPU. Not run on a GPU.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_kernels.impl import gpu
from lora_kernels.impl.eager.mask import keep_blocks, keep_rows, masked
from lora_kernels.operands.call import Gradients, Wanted
from lora_kernels.operands.grouped import GroupedCall

_DTYPES = (torch.bfloat16, torch.float32)
_ALIGNMENT = 16  # bytes that rows and stacks lie apart at multiples of
# Where it is one kernel: CUTLASS's for Hopper and Blackwell of data centres.
_GENERATIONS = (9, 10)


def serves(v: Tensor, call: GroupedCall) -> bool:
    """Whether grouped_mm is a kernel for x or dy, and reads the call's weights as they lie."""
    return v.is_cuda and v.dtype == torch.bfloat16 and _has_kernel(v.device) and fits(v, call)


def fits(v: Tensor, call: GroupedCall) -> bool:
    """Whether grouped_mm takes the call at all: its sizes, and one weight and adapter a group."""
    groups, weight = call.groups, call.weight
    if groups.adapters is not None or groups.weights is not None or v.dtype not in _DTYPES:
        return False
    step = _ALIGNMENT // v.element_size()
    stack, rows, columns = weight.stride()
    apart = (stack, columns if rows == 1 else rows)
    return 1 in (rows, columns) and not any(by % step for by in (*weight.shape[1:], *apart))


def _has_kernel(device: torch.device) -> bool:
    return hasattr(torch.nn.functional, "grouped_mm") and gpu.capability(device)[0] in _GENERATIONS


def forward(x: Tensor, call: GroupedCall) -> tuple[Tensor, Tensor]:
    """Return y [S, N] and xa [S, R]; see `reference`.

    Precision: as `linear`'s; xa is rounded again after dropout's factor and after scaling.
    """
    a, b = _factors(call, x)
    read, mine = _read(x, call), _own_rows(call)
    y = _product(read, call.weight.transpose(1, 2), call)
    xa = _product(_dropped(read, call), a.transpose(1, 2), call)
    y += _product(xa * _row_scaling(call, mine), b.transpose(1, 2), call)
    if call.bias is not None:
        y += call.bias[mine.clamp(max=len(call.bias) - 1)]
    outside = (mine == len(call.weight)).unsqueeze(1)
    y, xa = y.masked_fill(outside, 0.0), xa[:, : call.adapter.a.shape[1]]
    scatter = call.groups.scatter
    if scatter is not None:
        y = torch.zeros_like(y).index_copy_(0, scatter.long(), y)
    return y, xa.masked_fill(outside, 0.0)


def backward(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: GroupedCall, wanted: Wanted
) -> Gradients:
    """Return dx, dA, dB and dbias; see `reference`.

    Precision: as `linear`'s; with `rows` dx is summed over a row's groups in float32.
    """
    (lora_A, lora_B, _), scatter = call.adapter, call.groups.scatter
    (a, b), mine = _factors(call, dy), _own_rows(call)
    outside = (mine == len(call.weight)).unsqueeze(1)
    dys = dy if scatter is None else dy.index_select(0, scatter)
    dys, r = dys.masked_fill(outside, 0.0), lora_A.shape[1]
    scaling = _row_scaling(call, mine)
    dx = da = db = dbias = None
    if wanted.dx or wanted.da:
        dxa = (_product(dys, b, call) * scaling).masked_fill_(outside, 0.0)
    if wanted.dx:
        dx = _product(dys, call.weight, call) + _dropped(_product(dxa, a, call), call)
        dx = call.summed(dx.masked_fill_(outside, 0.0))
    if wanted.da and x is not None:
        kept = _dropped(_read(x, call), call).masked_fill(outside, 0.0)
        da = _product(dxa.t(), kept, call)[:, :r].to(lora_A.dtype)
    if wanted.db and xa is not None:
        wide = pad(xa * scaling, (0, a.shape[1] - r))
        db = _product(dys.t(), wide, call)[:, :, :r].to(lora_B.dtype)
    if wanted.dbias:
        ones = dys.new_ones(len(dys), _ALIGNMENT // dys.element_size())
        dbias = _product(ones.t(), dys, call)[:, 0]
    return Gradients(dx, da, db, dbias)


def _factors(call: GroupedCall, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [G, R, K] and B [G, N, R] in v's dtype, ranks filled up with zeros to whole rows."""
    a, b = call.adapter.a.to(v.dtype), call.adapter.b.to(v.dtype)
    more = -a.shape[1] % (_ALIGNMENT // v.element_size())
    return pad(a, (0, 0, 0, more)).contiguous(), pad(b, (0, more)).contiguous()


def _product(left: Tensor, right: Tensor, call: GroupedCall) -> Tensor:
    """Return each group's rows times its matrix, or of two matrices each group's share."""
    return torch.nn.functional.grouped_mm(left, right, offs=call.groups.offsets)


def _own_rows(call: GroupedCall) -> Tensor:
    """Return the group of each sorted row; G of rows that none has."""
    every = torch.arange(call.sorted_rows, device=call.weight.device)
    return torch.searchsorted(call.groups.offsets, every, right=True)


def _row_scaling(call: GroupedCall, mine: Tensor) -> float | Tensor:
    """Return the scaling, of each sorted row where adapters have their own."""
    scaling = call.adapter.scaling
    if not isinstance(scaling, Tensor) or scaling.ndim == 0:
        return scaling
    return scaling[mine.clamp(max=len(scaling) - 1)].unsqueeze(1)


def _read(x: Tensor, call: GroupedCall) -> Tensor:
    rows = call.groups.rows
    return x.contiguous() if rows is None else x.index_select(0, rows)


def _dropped(v: Tensor, call: GroupedCall) -> Tensor:
    """Return D of sorted rows."""
    if call.dropout is None:
        return v
    scatter, (count, columns) = call.groups.scatter, v.shape
    blocks = (
        keep_blocks(count, columns, call.dropout)
        if scatter is None
        else keep_rows(scatter.long(), columns, call.dropout)
    )
    out = torch.empty_like(v)
    for some, keep in blocks:
        masked(v[some], keep, out=out[some])
    return out.mul_(call.dropout.scale)

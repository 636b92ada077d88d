"""Which implementation will serve a layer's calls, as far as the layer says; nothing is computed.

A call's dtype is that of the weights, or of an autocast that is on here: another one around the
call may lead to another implementation.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lora_kernels.checks import FLOAT_DTYPES, is_dtensor
from lora_kernels.dispatch import choose, passed_over, refusal, slower_than_peft
from lora_kernels.native import LIBRARIES, absence
from lora_kernels.operands.call import autocast_dtype
from lora_kernels.operands.request import Request

_KERNELS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
_CURES = {
    "cpu": "install lora_kernels again where a C++ compiler is on PATH",
    "cuda": "install triton, or lora_kernels again with --no-build-isolation beside a CUDA build "
    "of torch",
}


class Served(NamedTuple):
    """What serves a layer's calls, such as "cpu (avx2)"; and why none of the kernels does."""

    by: str
    without_kernel: str | None = None


def request_of(
    base: nn.Module, rank: int, dropout: bool, op: str = "lora_linear"
) -> Request | None:
    """Return what a layer's calls ask of an implementation; None where its weight doesn't say.

    On meta it is nowhere yet, a fake one may name a device that isn't there, and a shard of FSDP1
    or ZeRO-3 isn't where calls are computed.
    """
    return request_of_weight(getattr(base, "weight", None), rank, dropout, op)


def request_of_weight(weight: Any, rank: int, dropout: bool, op: str) -> Request | None:
    """Return what calls with a weight ask, as `request_of` does of a layer."""
    if not isinstance(weight, Tensor) or weight.dtype not in FLOAT_DTYPES:
        return None
    if weight.is_meta or isinstance(weight, FakeTensor) or weight.ndim < 2 or not weight.numel():
        return None
    device = weight.device
    if is_dtensor(weight):
        # Offloaded shards lie on the CPU.
        mesh = cast(Any, weight).device_mesh.device_type
        device = device if device.type == mesh else torch.device(mesh)
    dtype = autocast_dtype(weight) or weight.dtype
    return Request(op, device, dtype, rank, dropout)


def served(impl: str, request: Request) -> Served:
    """Return what serves the request."""
    reason = None if impl == "auto" else refusal(impl, request)
    if reason is not None:
        return Served(f"{impl}, which raises", reason)
    name = choose(impl, request).name
    how = [str(torch.ops.lora_kernels.cpu_isa())] if name == "cpu" else []
    how += [] if request.format == "dense" else [f"weights in {request.format}"]
    by = f"{name} ({', '.join(how)})" if how else name
    if impl != "auto" or name != "eager":
        return Served(by)
    if slower_than_peft(request) is not None:
        by = f"{by}, with dropout PEFT"
    kernels, reasons = _KERNELS.get(request.device.type, ()), passed_over(request)
    text = "; ".join(f"{kernel}: {reasons[kernel]}" for kernel in kernels)
    return Served(by, text or f"no kernels for {request.device.type}")


def check_serves(impl: str, requests: dict[str, Request]) -> None:
    """Raise ValueError where a named implementation can't serve each layer, by path."""
    if impl == "auto":
        return
    reasons = {path: refusal(impl, request) for path, request in requests.items()}
    refused = {path: reason for path, reason in reasons.items() if reason is not None}
    if refused:
        path, reason = next(iter(refused.items()))
        more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise ValueError(
            f"impl: expected one that serves the layers as they are now, got {impl!r}: {reason} "
            f"({path or 'the layer'}{more})"
        )


def missed_part(requests: Iterable[Request]) -> str | None:
    """Return which part, if it were there, would serve one of the requests, and the cure."""
    for request in set(requests):
        part = request.device.type
        if part not in LIBRARIES or choose("auto", request).name != "eager":
            continue
        reason = absence(part)
        if reason is not None and refusal(part, request) == reason:
            return f"the compiled {part.upper()} part is absent, {reason}; cure: {_CURES[part]}"
    return None

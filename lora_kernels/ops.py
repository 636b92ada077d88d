"""Schemas, fakes, gradients and lazy bodies of the operators; torch only.

Each implementation is a pair of registered operators with the same two schemas, suffixed with its
name. Bodies are imported at the first call, so schemas exist before any backend does. An eager call
goes through the `autograd.Function` of autograd.py, which costs half of `custom_op` with
`register_autograd` (34 against 62 µs forward + backward, torch 2.13); the operators' own autograd
kernels serve graphs that captured an operator alone.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_kernels.autograd import CallParams, OperatorFunction, below_autograd
from lora_kernels.checks import (
    AUTOCAST_DTYPES,
    check_backward,
    check_lora_linear,
    check_memory,
)
from lora_kernels.impl import gpu
from lora_kernels.impl.reference import linear as reference
from lora_kernels.native import absence
from lora_kernels.operands.precision import has_wide_branch

_FORWARD = (
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? seed, "
    "Tensor? scaling_tensor, float scaling, int threshold) -> (Tensor y, Tensor xa)"
)
_BACKWARD = (
    "(Tensor dy, Tensor? x, Tensor? xa, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? seed, "
    "Tensor? scaling_tensor, float scaling, int threshold, bool[4] needs) "
    "-> (Tensor dx, Tensor da, Tensor db, Tensor dbias)"
)
_MODULES = {
    "reference": "lora_kernels.impl.reference.linear",
    "eager": "lora_kernels.impl.eager.linear",
    "triton": "lora_kernels.impl.triton.linear",
    # Where the compiled kernels are executed on tensors that are not a GPU's.
    "cuda": "lora_kernels.impl.cuda.machine",
}

_library = torch.library.Library("lora_kernels", "DEF")


def implement(op: str, body: Callable[..., Any], key: str) -> None:
    """Register the body of an operator that is defined here and computed in a module above."""
    _library.impl(op, body, key)


def forward_op(name: str) -> Any:
    """Return the forward operator's handle of one implementation."""
    return getattr(torch.ops.lora_kernels, f"lora_linear_forward_{name}").default


def backward_op(name: str) -> Any:
    """Return the backward operator's handle of one implementation."""
    return getattr(torch.ops.lora_kernels, f"lora_linear_backward_{name}").default


@cache
def _module(name: str) -> ModuleType:
    return import_module(_MODULES[name])


def _keeps_xa_wide(name: str, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    return name in ("reference", "eager") and has_wide_branch(x, lora_A, lora_B)


def _fake_forward(
    name, x, weight, lora_A, lora_B, bias, seed, scaling_tensor, scaling, threshold, packed=None
) -> tuple[Tensor, Tensor]:
    check_lora_linear(x, weight, lora_A, lora_B, bias, cast=None)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    dtype = torch.float32 if _keeps_xa_wide(name, x, lora_A, lora_B) else x.dtype
    return y, x.new_empty((y.numel() // weight.shape[0], lora_A.shape[0]), dtype=dtype)


def _fake_backward(
    name,
    dy,
    x,
    xa,
    weight,
    lora_A,
    lora_B,
    seed,
    scaling_tensor,
    scaling,
    threshold,
    needs,
    packed=None,
) -> tuple[Tensor, ...]:
    wide_xa = _keeps_xa_wide(name, dy, lora_A, lora_B)
    check_backward(dy, x, xa, weight, lora_A, lora_B, wide_xa=wide_xa)
    wanted = (
        dy.new_empty(*dy.shape[:-1], weight.shape[1]),
        torch.empty_like(lora_A, memory_format=torch.contiguous_format),
        torch.empty_like(lora_B, memory_format=torch.contiguous_format),
        dy.new_empty(dy.shape[-1]),
    )
    return tuple(t if need else dy.new_empty(0) for need, t in zip(needs, wanted, strict=True))


def _register(name: str) -> None:
    def forward(x, weight, lora_A, lora_B, bias, seed, scaling_tensor, scaling, threshold):
        check_lora_linear(x, weight, lora_A, lora_B, bias, cast=None)
        check_memory(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)
        check_memory(scaling=scaling_tensor)
        scale = scaling if scaling_tensor is None else scaling_tensor
        run = _module(name).lora_linear_forward
        return run(x, weight, lora_A, lora_B, bias, seed, scale, threshold)

    def backward(
        dy, x, xa, weight, lora_A, lora_B, seed, scaling_tensor, scaling, threshold, needs
    ):
        wide_xa = _keeps_xa_wide(name, dy, lora_A, lora_B)
        check_backward(dy, x, xa, weight, lora_A, lora_B, wide_xa=wide_xa)
        check_memory(dy=dy, x=x, xa=xa, weight=weight, lora_A=lora_A, lora_B=lora_B)
        check_memory(scaling=scaling_tensor)
        scale = scaling if scaling_tensor is None else scaling_tensor
        run = _module(name).lora_linear_backward
        grads = run(dy, x, xa, weight, lora_A, lora_B, seed, scale, threshold, needs)
        # A schema has a fixed number of tensors: an empty one stands for a gradient not asked for.
        return tuple(dy.new_empty(0) if grad is None else grad.contiguous() for grad in grads)

    _define_pair(name, "", forward, backward)


def _define_pair(
    name: str, more: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> None:
    """Define both operators of an implementation; `more`: arguments beyond the common ones."""
    for op, schema, body, fake in (
        (f"lora_linear_forward_{name}", _FORWARD, forward, _fake_forward),
        (f"lora_linear_backward_{name}", _BACKWARD, backward, _fake_backward),
    ):
        _library.define(op + schema.replace(") ->", f"{more}) ->"))
        _library.impl(op, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lora_kernels::{op}", partial(fake, name), lib=_library)
    for device in ("CPU", "CUDA"):
        _library.impl(f"lora_linear_forward_{name}", _cast_forward(name), f"Autocast{device}")
        _library.impl(f"lora_linear_backward_{name}", _cast_backward(name), f"Autocast{device}")
    _library.impl(f"lora_linear_forward_{name}", _recorded_forward(name), "Autograd")
    _library.impl(f"lora_linear_backward_{name}", _recorded_backward(name), "Autograd")


def _register_compiled(name: str, more: str = "") -> None:
    """Register operators whose bodies are in a library; the first call of one loads it.

    more: arguments beyond the common ones.
    """

    def loading(op: str, function: str, check: Callable[..., None]) -> Callable[..., Any]:
        def load_and_call(*args: Any) -> Any:
            reason = absence(name)
            if reason is not None:
                raise RuntimeError(f"impl: {name!r} can't serve this call: {reason}")
            check(*args)  # what isn't dense or on one device would come back here
            call = getattr(torch.ops.lora_kernels, op).default
            device = args[0].device.type
            if torch._C._dispatch_has_kernel_for_dispatch_key(call.name(), device.upper()):
                # The library's kernel takes precedence over this body from now on.
                return call(*args)
            if name not in _MODULES:
                raise RuntimeError(f"impl: {name!r} can't serve this call: x is on {device}")
            return getattr(_module(name), function)(*args)

        return load_and_call

    pair = (("lora_linear_forward", _check_forward), ("lora_linear_backward", _check_backward))
    _define_pair(name, more, *(loading(f"{op}_{name}", op, check) for op, check in pair))


def _check_forward(x, weight, lora_A, lora_B, bias, *_others) -> None:
    check_lora_linear(x, weight, lora_A, lora_B, bias, cast=None)


def _check_backward(dy, x, xa, weight, lora_A, lora_B, *_others) -> None:
    check_backward(dy, x, xa, weight, lora_A, lora_B)


def _as_autocast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [t.to(dtype) if t is not None and t.dtype in AUTOCAST_DTYPES else t for t in tensors]


def _cast_forward(name: str) -> Callable[..., Any]:
    """Return the forward operator's autocast kernel, for graphs that hold an operator alone.

    A call by the public functions has been cast before it comes to an operator.
    """

    def forward(x, weight, lora_A, lora_B, bias, *others, packed=None):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = _as_autocast(dtype, x, weight, bias)
        run = forward_op(name) if packed is None else partial(forward_op(name), packed=packed)
        with torch._C._DisableAutocast():
            return run(x, weight, lora_A, lora_B, bias, *others)

    return forward


def _cast_backward(name: str) -> Callable[..., Any]:
    def backward(dy, x, xa, weight, lora_A, lora_B, *others, packed=None):
        dtype = torch.get_autocast_dtype(dy.device.type)
        dy, x, weight = _as_autocast(dtype, dy, x, weight)
        wide = _keeps_xa_wide(name, dy, lora_A, lora_B)
        (xa,) = _as_autocast(torch.float32 if wide else dtype, xa)
        run = backward_op(name) if packed is None else partial(backward_op(name), packed=packed)
        with torch._C._DisableAutocast():
            return run(dy, x, xa, weight, lora_A, lora_B, *others)

    return backward


def _recorded_forward(name: str) -> Callable[..., Any]:
    """Return the forward operator's autograd kernel: what a captured graph's backward needs."""

    def forward(
        x, weight, lora_A, lora_B, bias, seed, scaling_tensor, scaling, threshold, packed=None
    ):
        operator = forward_op(name)
        run = operator if packed is None else partial(operator, packed=packed)
        if not _is_recorded(x, weight, lora_A, lora_B, bias):
            return below_autograd(
                run, x, weight, lora_A, lora_B, bias, seed, scaling_tensor, scaling, threshold
            )
        params = CallParams(run, backward_op(name), scaling, threshold)
        return OperatorFunction.apply(x, weight, lora_A, lora_B, bias, seed, scaling_tensor, params)

    return forward


def _recorded_backward(name: str) -> Callable[..., Any]:
    """Return the backward operator's autograd kernel: torch's operators where it is recorded."""

    def backward(dy, x, xa, weight, lora_A, lora_B, *others, packed=None):
        if _is_recorded(dy, x, xa, weight, lora_A, lora_B):
            return _plain_backward(dy, x, xa, weight, lora_A, lora_B, *others)
        operator = backward_op(name)
        run = operator if packed is None else partial(operator, packed=packed)
        return below_autograd(run, dy, x, xa, weight, lora_A, lora_B, *others)

    return backward


def _is_recorded(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _plain_backward(
    dy, x, xa, weight, lora_A, lora_B, seed, scaling_tensor, scaling, threshold, needs, packed=None
):
    scale = scaling if scaling_tensor is None else scaling_tensor
    grads = reference.lora_linear_backward(
        dy, x, xa, weight, lora_A, lora_B, seed, scale, threshold, needs
    )
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


for _name in ("reference", "eager", "triton"):
    _register(_name)
# packed: the weight in oneDNN's own layout, that of W forward and of Wᵀ backward, in the parts that
# `onednn.parts` makes; None: it isn't packed.
_register_compiled("cpu", ", Tensor[]? packed=None")
_register_compiled("cuda")
# The layer as torch.export records it, whatever the implementation: it keeps its gradient, runs
# fused, and `run_decompositions` makes it torch's own operators. Body in functional.py.
_library.define(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, "
    "Tensor? seed, Tensor? scaling_tensor, float scaling, int threshold, str impl) -> Tensor"
)
# Whether float32 products may be TF32's, by torch's own switch. The compiled CUDA part asks at each
# call on float32 tensors, forward and backward: what is compiled around an operator doesn't fix it.
_library.define("allows_tf32() -> bool")
_library.impl("allows_tf32", gpu.tf32_allowed, "CompositeExplicitAutograd")
# Whether t may be kept from call to call. It asks for each block of flags that it makes.
_library.define("in_shared_pool(Tensor t) -> bool")
_library.impl("in_shared_pool", gpu.in_shared_pool, "CompositeExplicitAutograd")
# How many multiprocessors torch leaves to others, as its switch is now: asked at each call.
_library.define("spared_multiprocessors() -> int")
_library.impl("spared_multiprocessors", gpu.spared_multiprocessors, "CompositeExplicitAutograd")

# Body in csrc/cpu/keep_lanes.cpp. Writes 1 (keep) or 0 (drop) to lanes, contiguous int16
# [count, 8], for Philox counters start, start + 1, ...; seed is the key, threshold in 1/65536.
_library.define("keep_lanes_(Tensor(a!) lanes, int start, int seed, int threshold) -> ()")
# Body in csrc/cpu/lora_linear.cpp: which version of the compiled kernels this processor runs.
_library.define("cpu_isa() -> str")


# Bodies in csrc/cuda/bindings.cpp. The kernel that serves a call; its programs, threads and bytes
# of shared memory. problem: [M, N, K, R, type (0 bfloat16, 1 float16, 2 float32, 3 float32 by
# TF32), dropout, rows at multiples of 16 bytes, backward, dx, dA, dB, dbias]; device as below.
_library.define("cuda_plan(int[] problem, int[] device) -> (str, int[])")
# The compiled kernels' calls with their launches written down
# instead of made. device: [arch, multiprocessors, bytes of shared memory]; zeros: flags to use.
_RECORD = "str names, Tensor numbers, Tensor params, Tensor[] scratch)"
for _op, _schema in (("forward", _FORWARD), ("backward", _BACKWARD)):
    _head, _results = _schema.split(" -> (")
    _results = _results.rstrip(")")
    _library.define(
        f"cuda_{_op}_recorded{_head[:-1]}, int[] device, Tensor? zeros) -> ({_results}, {_RECORD}"
    )

"""Schemas, fakes and lazy bodies of the operators; torch only.

Each implementation is a pair of registered operators with the same two schemas, suffixed with its
name. Bodies are imported at the first call, so schemas exist before any backend does.
`autograd.Function` stays outside (autograd.py): that costs half of `custom_op` with
`register_autograd` (34 against 62 µs forward + backward, torch 2.13) and compiles the same.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_kernels import _pools, _tf32
from lora_kernels._native import absence

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
    "reference": "lora_kernels.reference",
    "eager": "lora_kernels._eager",
    "triton": "lora_kernels._triton.linear",
    # Where the compiled kernels are executed on tensors that are not a GPU's.
    "cuda": "lora_kernels._cuda.machine",
}

_library = torch.library.Library("lora_kernels", "DEF")


@cache
def _module(name: str) -> ModuleType:
    return import_module(_MODULES[name])


def _outside_autocast(x: Tensor, body: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a body's matmuls from being cast again: functional.py has chosen the dtype."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)(body)
    return body


def _fake_forward(
    x, weight, lora_A, lora_B, bias, seed, scaling_tensor, scaling, threshold, packed=None
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty(y.numel() // weight.shape[0], lora_A.shape[0])


def _fake_backward(
    dy, x, xa, weight, lora_A, lora_B, seed, scaling_tensor, scaling, threshold, needs, packed=None
) -> tuple[Tensor, ...]:
    wanted = (
        dy.new_empty(*dy.shape[:-1], weight.shape[1]),
        torch.empty_like(lora_A, memory_format=torch.contiguous_format),
        torch.empty_like(lora_B, memory_format=torch.contiguous_format),
        dy.new_empty(dy.shape[-1]),
    )
    return tuple(t if need else t.new_empty(0) for need, t in zip(needs, wanted, strict=True))


def _register(name: str) -> None:
    forward_name, backward_name = f"lora_linear_forward_{name}", f"lora_linear_backward_{name}"

    def forward(x, weight, lora_A, lora_B, bias, seed, scaling_tensor, scaling, threshold):
        scale = scaling if scaling_tensor is None else scaling_tensor
        run = _outside_autocast(x, _module(name).lora_linear_forward)
        return run(x, weight, lora_A, lora_B, bias, seed, scale, threshold)

    def backward(
        dy, x, xa, weight, lora_A, lora_B, seed, scaling_tensor, scaling, threshold, needs
    ):
        scale = scaling if scaling_tensor is None else scaling_tensor
        run = _outside_autocast(dy, _module(name).lora_linear_backward)
        grads = run(dy, x, xa, weight, lora_A, lora_B, seed, scale, threshold, needs)
        # A schema has a fixed number of tensors: an empty one stands for a gradient not asked for.
        return tuple(dy.new_empty(0) if grad is None else grad.contiguous() for grad in grads)

    _define(forward_name, _FORWARD, forward, _fake_forward)
    _define(backward_name, _BACKWARD, backward, _fake_backward)


def _define(op: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(op + schema)
    _library.impl(op, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{op}", fake, lib=_library)


def _register_compiled(name: str, more: str = "") -> None:
    """Register operators whose bodies are in a library; the first call of one loads it.

    more: arguments beyond the common ones.
    """

    def loading(op: str, function: str) -> Callable[..., Any]:
        def load_and_call(*args: Any) -> Any:
            reason = absence(name)
            if reason is not None:
                raise RuntimeError(f"impl: {name!r} can't serve this call: {reason}")
            call = getattr(torch.ops.lora_kernels, op).default
            device = args[0].device.type
            if torch._C._dispatch_has_kernel_for_dispatch_key(call.name(), device.upper()):
                # The library's kernel takes precedence over this body from now on.
                return call(*args)
            if name not in _MODULES:
                raise RuntimeError(f"impl: {name!r} can't serve this call: x is on {device}")
            return getattr(_module(name), function)(*args)

        return load_and_call

    for op, schema, fake in (
        ("lora_linear_forward", _FORWARD, _fake_forward),
        ("lora_linear_backward", _BACKWARD, _fake_backward),
    ):
        schema = schema.replace(") ->", f"{more}) ->")
        _define(f"{op}_{name}", schema, loading(f"{op}_{name}", op), fake)


for _name in ("reference", "eager", "triton"):
    _register(_name)
# packed: the weight in oneDNN's own layout, that of W forward and of Wᵀ backward, in the parts that
# `_onednn.parts` makes; None: it isn't packed.
_register_compiled("cpu", ", Tensor[]? packed=None")
_register_compiled("cuda")
# Whether float32 products may be TF32's, by torch's own switch. The compiled CUDA part asks at each
# call on float32 tensors, forward and backward: what is compiled around an operator doesn't fix it.
_library.define("allows_tf32() -> bool")
_library.impl("allows_tf32", _tf32.allowed, "CompositeExplicitAutograd")
# Whether t may be kept from call to call. It asks for each block of flags that it makes.
_library.define("in_shared_pool(Tensor t) -> bool")
_library.impl("in_shared_pool", _pools.in_shared_pool, "CompositeExplicitAutograd")

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


def forward_op(name: str) -> Any:
    """Return the forward operator's handle of one implementation."""
    return getattr(torch.ops.lora_kernels, f"lora_linear_forward_{name}").default


def backward_op(name: str) -> Any:
    """Return the backward operator's handle of one implementation."""
    return getattr(torch.ops.lora_kernels, f"lora_linear_backward_{name}").default

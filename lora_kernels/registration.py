"""An op's operators for all implementations: schemas, fakes, bodies, autocast and autograd kernels.

Each implementation is a pair of registered operators with the same two schemas, suffixed with its
name. Bodies are imported at the first call, so schemas exist before any backend does. An eager call
goes through an `autograd.Function` of the op's file, which costs half of `custom_op` with
`register_autograd` (34 against 62 µs forward + backward, torch 2.13); the operators' own autograd
kernels serve graphs that captured an operator alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_dynamo_compiling

from lora_kernels.checks import lack_of_memory
from lora_kernels.impl import executor, gpu
from lora_kernels.impl.cuda import launch
from lora_kernels.native import absence

PYTHON = ("reference", "eager", "triton")
COMPILED = {"cpu": "a CPU", "cuda": "a CUDA device"}  # and what each needs

# An argument of operators, and what callers call it.
NAMES = {"scaling_tensor": "scaling", "parts": "weight"}

library = torch.library.Library("lora_kernels", "DEF")
# Below what notes views, too: a result that is one, of what a body allocated, couldn't be changed
# in place by whoever gets it from an autograd.Function.
_BelowAutograd = torch._C._AutoDispatchBelowADInplaceOrView


class Operators(NamedTuple):
    """The handles of an op's operators, of one implementation."""

    forward: Any
    backward: Any


@dataclass(frozen=True)
class Direction:
    """One of an op's two operators, the same for every implementation but for its body.

    name: "forward" or "backward", as the function in an implementation's module.
    schema: arguments and results.
    fake: of the implementation's name and the arguments; results without data.
    body: of the implementation's name, its function and the arguments.
    check: of the arguments; raises where they don't fit.
    cast: of the implementation's name, autocast's dtype and the arguments; what autocast makes of
        them, for graphs that hold an operator alone: a public function's call comes cast.
    recorded: of both handles and the arguments; results that autograd knows how to differentiate.
    """

    name: str
    schema: str
    fake: Callable[..., Any]
    body: Callable[..., Any]
    check: Callable[..., None]
    cast: Callable[..., tuple[Any, ...]]
    recorded: Callable[..., Any]


def operators(op: str, impl: str) -> Operators:
    """Return the handles of an op's operators by one implementation."""
    return Operators(_handle(op, "forward", impl), _handle(op, "backward", impl))


def _handle(op: str, direction: str, impl: str) -> Any:
    return getattr(torch.ops.lora_kernels, f"{op}_{direction}_{impl}").default


# By an operator's id, the body of one in Python. Operators live as long as torch; their own hash is
# a function in Python.
_BODIES: dict[int, Callable[..., Any]] = {}
# What may be an argument of a body that is called without torch's dispatcher: no subclass of Tensor
# that wants to see operators. What isn't here has a call that is longer anyway.
_DIRECT = {Tensor, torch.nn.Parameter, type(None), int, float, tuple}
_count_modes = torch._C._len_torch_dispatch_stack
_count_function_modes = torch._C._len_torch_function_stack
_is_profiled = torch._C._autograd._profiler_enabled
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def below_autograd(operator: Any, *args: Any) -> Any:
    """Call an operator past its autocast and autograd kernels, for callers that did their work.

    It takes less time than torch's fallback did for operators without such kernels. A body in
    Python is called itself, unless a mode, a profiler or a subclass of Tensor looks at operators:
    torch's way to it takes three times as long as to a compiled one.
    """
    if is_dynamo_compiling():  # which records operators by itself
        return operator(*args)
    body = _BODIES.get(id(operator))
    # `_op` is what an OpOverload's call calls, 0.2 µs later.
    operator = operator._op if body is None or _is_seen(args) else body
    if _is_any_autocast_enabled():
        with _BelowAutograd(), torch._C._DisableAutocast():
            return operator(*args)
    with _BelowAutograd():
        return operator(*args)


def _is_seen(args: tuple[Any, ...]) -> bool:
    """Whether a mode, a profiler or an argument looks at operators.

    So do tensors that autograd batches (is_grads_batched), which are no subclass.
    """
    if _count_modes() or _count_function_modes() or _is_profiled():
        return True
    if not _DIRECT.issuperset(map(type, args)):
        return True
    return any(type(t) is Tensor and _is_batched(t) for t in args)


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def as_results(dy: Tensor, gradients: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """Return gradients as a schema has them, a fixed number: an empty one is not asked for."""
    return tuple(dy.new_empty(0) if grad is None else grad.contiguous() for grad in gradients)


def register(op: str, file: str, *directions: Direction) -> None:
    """Define an op's operators for every implementation; `file` names its module in each."""
    for direction in directions:
        for impl in PYTHON:
            body = partial(_python_body, direction, op, impl, file)
            _define(op, impl, direction, body)
            _BODIES[id(_handle(op, direction.name, impl))] = body
        for impl in COMPILED:
            _define(op, impl, direction, partial(_loading_body, direction, op, impl))
    for impl in (*PYTHON, *COMPILED):
        both = operators(op, impl)
        for direction, handle in zip(directions, both, strict=True):
            name = f"{op}_{direction.name}_{impl}"
            for device in ("CPU", "CUDA"):
                kernel = partial(_cast_and_call, direction, impl, handle)
                library.impl(name, kernel, f"Autocast{device}")
            library.impl(name, partial(direction.recorded, both), "Autograd")


def _define(op: str, impl: str, direction: Direction, body: Callable[..., Any]) -> None:
    name = f"{op}_{direction.name}_{impl}"
    library.define(name + direction.schema)
    library.impl(name, body, "CompositeExplicitAutograd")
    fake = partial(_fake, direction, op, impl)
    torch.library.register_fake(f"lora_kernels::{name}", fake, lib=library)


def _names(op: str, direction: Direction, impl: str) -> list[str]:
    """Return what callers call an operator's arguments."""
    arguments = _handle(op, direction.name, impl)._schema.arguments
    return [NAMES.get(argument.name, argument.name) for argument in arguments]


def _fake(direction: Direction, op: str, impl: str, *args: Any) -> Any:
    """Return unwritten results for tensors without memory, fake ones or all on meta.

    Torch comes here if a single tensor is on meta: the results would be read as if they were made.
    """
    given = [
        (name, t)
        for name, arg in zip(_names(op, direction, impl), args, strict=True)
        for t in (arg if isinstance(arg, (list, tuple)) else [arg])
        if isinstance(t, Tensor)
    ]
    first, device = given[0][0], given[0][1].device
    for name, t in given:
        if (t.device.type == "meta") != (device.type == "meta"):
            raise ValueError(
                f"{name}: expected a tensor on {device}, as {first} is, got one on {t.device}"
            )
    return direction.fake(impl, *args)


def _python_body(direction: Direction, op: str, impl: str, file: str, *args: Any) -> Any:
    """Be the body of an implementation in Python; compiled ones look at memory themselves."""
    for i, arg in enumerate(args):
        for t in arg if isinstance(arg, (list, tuple)) else (arg,):
            lack = lack_of_memory(t) if isinstance(t, Tensor) else None
            if lack is not None:
                raise ValueError(f"{_names(op, direction, impl)[i]}: expected {lack}")
    function = getattr(_module(f"lora_kernels.impl.{impl}.{file}"), direction.name)
    return direction.body(impl, function, *args)


def _loading_body(direction: Direction, op: str, impl: str, *args: Any) -> Any:
    """Be the body of an operator whose own is in a library, which the first call of one loads."""
    reason = absence(impl)
    if reason is not None:
        raise RuntimeError(f"impl: {impl!r} can't serve this call: {reason}")
    direction.check(*args)  # what isn't dense or on one device would come back here
    handle = getattr(operators(op, impl), direction.name)
    device = args[0].device.type
    if torch._C._dispatch_has_kernel_for_dispatch_key(handle.name(), device.upper()):
        # The library's kernel takes precedence over this body from now on.
        return handle(*args)
    if impl == "cuda" and executor.of(impl) is not None:
        return launch.call(handle, args)
    needed = COMPILED[impl]
    raise RuntimeError(f"impl: {impl!r} can't serve this call: needs {needed}, got {device}")


def _cast_and_call(direction: Direction, impl: str, handle: Any, *args: Any) -> Any:
    dtype = torch.get_autocast_dtype(args[0].device.type)
    args = direction.cast(impl, dtype, *args)
    with torch._C._DisableAutocast():
        return handle(*args)


@cache
def _module(name: str) -> ModuleType:
    return import_module(name)


# Whether float32 products may be TF32's, by torch's own switch. The compiled CUDA part asks at each
# call on float32 tensors, forward and backward: what is compiled around an operator doesn't fix it.
library.define("allows_tf32() -> bool")
library.impl("allows_tf32", gpu.tf32_allowed, "CompositeExplicitAutograd")
# Whether t may be kept from call to call. It asks for each block of flags that it makes.
library.define("in_shared_pool(Tensor t) -> bool")
library.impl("in_shared_pool", gpu.in_shared_pool, "CompositeExplicitAutograd")
# How many multiprocessors torch leaves to others, as its switch is now: asked at each call.
library.define("spared_multiprocessors() -> int")
library.impl("spared_multiprocessors", gpu.spared_multiprocessors, "CompositeExplicitAutograd")
for _schema, _body in launch.ASKED.items():
    library.define(_schema)
    library.impl(_schema.partition("(")[0], _body, "CompositeExplicitAutograd")

# Body in csrc/cpu/keep_lanes.cpp. Writes 1 (keep) or 0 (drop) to lanes, contiguous int16
# [count, 8], for Philox counters start, start + 1, ...; seed is the key, threshold in 1/65536.
library.define("keep_lanes_(Tensor(a!) lanes, int start, int seed, int threshold) -> ()")
# Body in csrc/cpu/linear.cpp: which version of the compiled kernels this processor runs.
library.define("cpu_isa() -> str")

# Bodies in csrc/cuda/host/bindings.cpp. The kernel that serves a call; its programs, threads, bytes
# of shared memory. problem: [M, N, K, R, type (0 bfloat16, 1 float16, 2 float32, 3 float32 by
# TF32), dropout, rows at multiples of 16 bytes, backward, dx, dA, dB, dbias, W's store (0 dense, 1
# codes, 2 codes of nested scales)]; device: [arch, multiprocessors, bytes of shared memory a
# program may have].
library.define("cuda_plan(int[] problem, int[] device) -> (str, int[])")

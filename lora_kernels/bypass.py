"""What a fused call would bypass: it reads parameters and calls no submodule.

So each submodule must compute what its class says and nothing else may hang on its call. These
functions run at every call: they read `_parameters` and `__dict__` themselves, since an attribute
of an nn.Module costs up to 1 µs.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from lora_kernels.checks import FLOAT_DTYPES, is_dtensor
from lora_kernels.transforms import needs_plain_torch

# Where torch.export traces, parameters and inputs are fake.
PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)
_LINEAR_FORWARD = nn.Linear.forward
_STRIDED = torch.strided
_GLOBAL_HOOKS = (
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
)


def everywhere_reason() -> str | None:
    """Return what would be bypassed in every layer; None where nothing would."""
    if needs_plain_torch():
        return (
            "inside a torch.func transform, forward-mode differentiation, a trace or a FLOP count"
        )
    if (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ) and not all(map(_of_torch, chain(*map(dict.values, _GLOBAL_HOOKS)))):
        return "there are hooks for all modules"
    if nn.Linear.forward is not _LINEAR_FORWARD:
        return "torch.nn.Linear.forward was replaced"
    return None


def read_linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | str:
    """Return the weight and bias of a module that computes x Wᵀ + bias, or why it isn't read.

    They lie in `_parameters`, as plain tensors too (torch.func.functional_call), or in `__dict__`
    (views of a flat parameter during FSDP1's forward).
    """
    kind = type(module)
    if kind is not nn.Linear and not _inherits_linear(kind):
        return f"is {kind.__name__}, not torch.nn.Linear"
    own = module.__dict__
    parameters = own["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) is not nn.Parameter:
        weight = own.get("weight") if weight is None else weight
        reason = _tensor_reason(weight)
        if reason is not None:
            return f"weight {reason}"
    if weight.dtype not in FLOAT_DTYPES or weight.layout is not _STRIDED:
        return f"weight is {weight.dtype}, {weight.layout}"
    if type(bias) is not nn.Parameter:
        if bias is None and "bias" not in parameters and "bias" not in own:
            return "has lost its bias"
        bias = own.get("bias") if bias is None else bias
        reason = None if bias is None else _tensor_reason(bias)
        if reason is not None:
            return f"bias {reason}"
    if (  # `_has_hooks`, without a call
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    ):
        return "has hooks"
    return weight, bias


def dropout_reason(module: nn.Module) -> str | None:
    """Return why a dropout module's call can't be left out; None where it can."""
    if type(module) is nn.Dropout:
        if not 0.0 <= module.p < 1.0:
            return f"dropout's p is {module.p}"
        if module.inplace:
            return "dropout works in place"
    elif type(module) is not nn.Identity:
        return f"dropout is {type(module).__name__}"
    return "dropout has hooks" if _has_hooks(module.__dict__) else None


def input_reason(x: Any) -> str | None:
    """Return why an input is the submodules' own to compute with; None where it isn't.

    What is nothing like a tensor has no reason: checks refuse it by name.
    """
    kind = type(x)
    if kind is not Tensor and kind not in PLAIN_TENSORS and not is_dtensor(x):
        return f"x is a {kind.__name__}" if hasattr(kind, "__torch_function__") else None
    if x.is_nested:
        return "x is nested"
    if x.layout is not torch.strided:
        return f"x is {x.layout}"
    return "x is on meta" if x.is_meta else None


def _of_torch(hook: Any) -> bool:
    """Whether a hook is torch's own: its trackers only note in which module an operator runs.

    CommDebugMode and MemTracker set such hooks, to measure what else would run.
    """
    return str(getattr(hook, "__module__", None)).startswith("torch.")


def _has_hooks(own: dict[str, Any]) -> bool:
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own  # how accelerate hooks a module
    )


def _inherits_linear(kind: type[nn.Module]) -> bool:
    """Whether a subclass of nn.Linear computes and keeps its parameters as nn.Linear does."""
    return (
        kind.forward is _LINEAR_FORWARD
        and kind.__call__ is nn.Module.__call__
        and kind.__getattr__ is nn.Module.__getattr__
        and not hasattr(kind, "weight")  # a property would hide the parameter
        and not hasattr(kind, "bias")
    )


def _tensor_reason(t: Any) -> str | None:
    kind = type(t)
    if kind not in PLAIN_TENSORS and not is_dtensor(t):
        return f"is a {kind.__name__}"
    return None

"""What a fused call would bypass: it reads parameters and calls no submodule.

So each submodule must compute what its class says and nothing else may hang on its call. These
functions run at every call: they read `_parameters` and `__dict__` themselves, since an attribute
of an nn.Module costs up to 1 µs.
"""

import math
import sys
from itertools import chain, pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lora_kernels.checks import FLOAT_DTYPES, check_memory, is_dtensor, is_finite
from lora_kernels.transforms import needs_plain_torch

# Where torch.export traces, parameters and inputs are fake.
PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)
INFERENCE = "an inference tensor can't be saved for backward"
# Linear layers with a forward of their own, by the module that defines it: none is imported here.
_OTHER_LINEARS = {
    "transformers.pytorch_utils": "Conv1D",  # x W + bias, for W [K, N]
    "transformers.models.falcon.modeling_falcon": "FalconLinear",
}
_STRIDED = torch.strided
_count_function_modes = torch._C._len_torch_function_stack
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_GLOBAL_HOOKS = (
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
)


# Torch's tracers call what they replace; ZeRO-3's product is the same, differentiated anew.
_SAME_RESULTS = ("torch.", "deepspeed.runtime.zero.linear")


def origin(function: Any) -> str:
    """Return the module whose code a function is, whatever functools.wraps made it say."""
    names = getattr(function, "__globals__", None)
    return str(getattr(function, "__module__", "") if names is None else names.get("__name__"))


def _gives_the_same(function: Any) -> bool:
    return origin(function).startswith(_SAME_RESULTS)


def _if_the_same(function: Any) -> Any:
    return function if _gives_the_same(function) else None


# What a call of a submodule goes through: profilers, quantisers and tests put their own there, even
# before this module is imported. What is found again as it was needn't be asked for its origin.
_LINEAR, _LINEAR_FORWARD = map(_if_the_same, (functional.linear, nn.Linear.forward))
_CALL, _CALL_IMPL = map(_if_the_same, (nn.Linear.__call__, nn.Linear._call_impl))
_DROPOUT, _DROPOUT_FORWARD = map(_if_the_same, (functional.dropout, nn.Dropout.forward))


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
    if not (
        nn.Linear.forward is _LINEAR_FORWARD
        and functional.linear is _LINEAR
        and nn.Linear.__call__ is _CALL
        and nn.Linear._call_impl is _CALL_IMPL
    ):
        calls = nn.Linear.forward, functional.linear, nn.Linear.__call__, nn.Linear._call_impl
        if not all(map(_gives_the_same, calls)):
            return "torch.nn.Linear's forward, its product or its call was replaced"
    if is_dynamo_compiling() or not (_count_function_modes() or _count_dispatch_modes()):
        return None
    modes = (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())
    kinds = [type(mode) for mode in modes]
    foreign = (kind.__name__ for kind in kinds if not (_of_torch(kind) or _only_looks(kind)))
    return next((f"a torch function or dispatch mode is active, {name}" for name in foreign), None)


def read_linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | str:
    """Return the weight and bias of a module that computes x Wᵀ + bias, or why it isn't read.

    They lie in `_parameters`, as plain tensors too (torch.func.functional_call), or in `__dict__`
    (views of a flat parameter during FSDP1's forward). W of transformers' Conv1D, which keeps it as
    [K, N], is a view.
    """
    kind = type(module)
    formula = "Linear" if kind is nn.Linear else _formula(kind)
    if formula is None:
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
        or "_call_impl" in own
    ):
        return "has hooks"
    if formula == "Linear":
        return weight, bias
    return _read_other(formula, weight, bias, own)


def read_plain(module: nn.Module, kind: type[nn.Module]) -> tuple[Tensor, Tensor | None] | str:
    """Return the weight and bias of a layer of a class that the caller knows, or why not.

    Its forward is torch's or transformers' own, not one that was put in its place.
    """
    known = (*_SAME_RESULTS, "transformers.models.")
    if type(module) is not kind or not origin(kind.forward).startswith(known):
        return f"is {type(module).__name__}, not torch.nn.{kind.__name__}"
    own = module.__dict__
    weight, bias = (own["_parameters"].get(name, own.get(name)) for name in ("weight", "bias"))
    for name, t in (("weight", weight), ("bias", bias)):
        reason = None if t is None and name == "bias" else _tensor_reason(t)
        if reason is not None:
            return f"{name} {reason}"
    if weight.dtype not in FLOAT_DTYPES or weight.layout is not _STRIDED:
        return f"weight is {weight.dtype}, {weight.layout}"
    return "has hooks" if _has_hooks(own) else (weight, bias)


def refuses_strides(module: nn.Module, x: Tensor) -> bool:
    """Whether a module's own forward would raise for the strides of x, as Conv1D's view does."""
    kind = type(module)
    if kind is nn.Linear or _formula(kind) != "Conv1D":
        return False
    leading = [(n, by) for n, by in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    return any(by != n * inner for (_, by), (n, inner) in pairwise(leading)) and x.numel() > 0


def dropout_reason(module: nn.Module) -> str | None:
    """Return why a dropout module's call can't be left out; None where it can."""
    if type(module) is nn.Dropout:
        if not 0.0 <= module.p < 1.0:
            return f"dropout's p is {module.p}"
        if module.inplace:
            return "dropout works in place"
        if not (
            nn.Dropout.forward is _DROPOUT_FORWARD and functional.dropout is _DROPOUT
        ) and not all(map(_gives_the_same, (nn.Dropout.forward, functional.dropout))):
            return "torch.nn.Dropout.forward or torch.nn.functional.dropout was replaced"
    elif type(module) is not nn.Identity:
        return f"dropout is {type(module).__name__}"
    return "dropout has hooks" if _has_hooks(module.__dict__) else None


def scaling_reason(scaling: Any) -> str | None:
    """Return why a scaling that isn't a float is the submodules' own to multiply by, or None."""
    if isinstance(scaling, Tensor):
        if scaling.requires_grad:
            return "scaling requires grad"
        if scaling.ndim != 0 or not scaling.is_floating_point():
            return f"scaling is a {scaling.dtype} tensor of shape {list(scaling.shape)}"
        if type(scaling) is Tensor and scaling.is_cpu and not torch.compiler.is_compiling():
            check_memory(scaling=scaling)
            if not math.isfinite(scaling):
                return f"scaling is {float(scaling)}"
    elif not isinstance(scaling, Real):
        return f"scaling is a {type(scaling).__name__}"
    elif not is_finite(scaling):
        return f"scaling is {scaling}"
    return None


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


def tensors_reason(**tensors: Any) -> str | None:
    """Return why tensors, x among them, aren't a fused call's to compute with; None where so."""
    for name, t in tensors.items():
        if type(t) not in PLAIN_TENSORS:
            return f"{name} is a {type(t).__name__}"
        if t.is_meta:
            return f"{name} is on meta"
    return inference_reason(*tensors.values())


def inference_reason(*tensors: Tensor) -> str | None:
    """Return that one of a call's tensors couldn't be saved for backward, or None."""
    # dynamo asks the same by itself.
    if not torch.is_grad_enabled() or is_dynamo_compiling():
        return None
    return INFERENCE if any(t.is_inference() for t in tensors) else None


def hooks_reason(module: nn.Module) -> str | None:
    """Return that something hangs on a module's call, or None."""
    return "has hooks" if _has_hooks(module.__dict__) else None


def _of_torch(hook: Any) -> bool:
    """Whether a hook, or a mode's class, is torch's own: these change no result of a layer.

    CommDebugMode and MemTracker set such hooks, to measure what else would run.
    """
    return str(getattr(hook, "__module__", None)).startswith("torch.")


def _only_looks(kind: type) -> bool:
    """Whether a mode's class says that it changes no result, as counters may."""
    return getattr(kind, "lora_kernels_only_looks", False) is True


def _has_hooks(own: dict[str, Any]) -> bool:
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own  # how accelerate hooks a module
        or "_call_impl" in own
    )


def _formula(kind: type[nn.Module]) -> str | None:
    """Return the name of the linear layer whose forward a class has, or None.

    A function put in that forward's place, by functools.wraps or not, has another module's globals.
    """
    forward: Any = kind.forward
    name = "Linear"
    if forward is not _LINEAR_FORWARD:
        # Not by its __qualname__, which dynamo (torch 2.13) compares wrongly.
        module = origin(forward)
        name = _OTHER_LINEARS.get(module, "")
        if not name or forward is not getattr(sys.modules[module], name).forward:
            return None
    plain = (
        kind.__call__ is nn.Module.__call__
        and kind.__getattr__ is nn.Module.__getattr__
        and not hasattr(kind, "weight")  # a property would hide the parameter
        and not hasattr(kind, "bias")
    )
    return name if plain else None


def _read_other(
    name: str, weight: Tensor, bias: Tensor | None, own: dict[str, Any]
) -> tuple[Tensor, Tensor | None] | str:
    """Return W and bias of a linear layer of transformers, or why its own forward is to run."""
    if name == "FalconLinear":
        if bias is not None and _autocasts(weight.device.type):
            return "adds its bias outside autocast"
        return weight, bias
    if bias is None:
        return "has no bias, which its forward adds"
    if weight.ndim != 2 or weight.shape[1] != own.get("nf"):
        return f"weight has shape {list(weight.shape)}, its nf is {own.get('nf')}"
    return weight.t(), bias


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _tensor_reason(t: Any) -> str | None:
    kind = type(t)
    if kind not in PLAIN_TENSORS and not is_dtensor(t):
        return f"is a {kind.__name__}"
    return None

"""What the patched layers beside PEFT's plain linear one have in common.

That one, `FusedLinear`, has a forward of its own, which costs a call less.
"""

from collections.abc import Callable
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from lora_kernels._peft.variants import variant_reason
from lora_kernels.bypass import origin
from lora_kernels.usage import Calls

_PEFT = "peft.tuners.lora.layer"  # whose forward a fused call stands for


class Fused:
    """Mixed into a class of PEFT's: a call is fused unless there is a reason not to.

    As with `FusedLinear` a layer's class is changed and its `__dict__` kept; what isn't fused is
    PEFT's own forward.
    """

    _lora_kernels_theirs: type[Any]
    _lora_kernels_op: str
    _lora_kernels_impl: str
    _lora_kernels_calls: Calls
    _lora_kernels_packed = None  # there are no copies to make

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted layer's output; arguments as PEFT's forward."""
        own = self.__dict__
        impl: str | None = own.get("_lora_kernels_impl")
        if impl is None:  # unpatched meanwhile
            return self._lora_kernels_theirs.forward(self, x, *args, **kwargs)
        # A counter would be one of the things that a compiled graph depends on.
        calls = None if is_dynamo_compiling() else own.get("_lora_kernels_calls")
        call = self._call_of(x, args, kwargs, impl)
        if isinstance(call, str):
            if calls is not None:
                calls.leave(call)
            return self._unfused(x, *args, **kwargs)
        if calls is not None:
            calls.fused += 1
        return call()

    def _lora_kernels_left(self) -> str | None:
        """Return why the layer keeps PEFT's forward in its present state, or None."""
        raise NotImplementedError

    def _unfused(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of a call that isn't fused: PEFT's."""
        return self._lora_kernels_theirs.forward(self, x, *args, **kwargs)

    def _call_of(
        self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any], impl: str
    ) -> Callable[[], Tensor] | str:
        """Return what computes a call of these arguments, or why it is PEFT's to compute."""
        return "called with more than x" if args or kwargs else self._fused_call(x, impl)

    def _fused_call(self, x: Any, impl: str) -> Callable[[], Tensor] | str:
        """Return what computes a call, or why it is PEFT's to compute."""
        raise NotImplementedError


def path_of(layer: Any) -> str:
    """Return the path that an error in backward names; compiled graphs don't depend on it."""
    calls = None if is_dynamo_compiling() else vars(layer).get("_lora_kernels_calls")
    return "" if calls is None else str(calls.path)


def active_adapter(
    layer: LoraLayer, adapters: Any, forward: Any
) -> tuple[str, None] | tuple[None, str]:
    """Return the one adapter that a call applies, or why there isn't one that is fused.

    adapters: the layer's A by name. forward: of PEFT's class, which a fused call stands for.
    """
    if origin(forward) != _PEFT:
        return None, "peft's forward was replaced"
    if layer._disable_adapters:
        return None, "adapters disabled"
    if layer.merged_adapters:
        return None, f"merged: {', '.join(layer.merged_adapters)}"
    names = [name for name in layer.active_adapters if name in adapters]
    if len(names) != 1:
        many = f"{len(names)} active adapters, one is fused"
        return None, many if names else "no active adapter"
    variant = layer.lora_variant.get(names[0])
    if variant is not None or layer.use_dora.get(names[0]):
        return None, "DoRA" if variant is None else variant_reason(variant)
    return names[0], None

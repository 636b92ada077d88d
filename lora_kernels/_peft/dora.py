"""What a fused call reads of PEFT's DoRA variant, or why that computes it itself."""

from typing import Any

from torch import Tensor

from lora_kernels._peft.variants import variant_reason
from lora_kernels.bypass import PLAIN_TENSORS, hooks_reason, inference_reason, origin
from lora_kernels.checks import FLOAT_DTYPES, is_dtensor
from lora_kernels.dispatch import slower_than_peft
from lora_kernels.operands.dora import DoraCall
from lora_kernels.operands.request import Request

_VARIANTS, _LAYERS = "peft.tuners.lora.variants", "peft.tuners.lora.dora"


def read_magnitude(layer: Any, name: str) -> Tensor | str:
    """Return the magnitude of a layer's adapter, or why PEFT's forward is kept.

    PEFT's cache of norms (off by default) isn't read: nothing tells when it is stale.
    """
    variant = layer.lora_variant.get(name)
    if variant is None:
        return "DoRA"
    if type(variant).__name__ != "DoraLinearVariant" or origin(variant.forward) != _VARIANTS:
        return variant_reason(variant)
    if getattr(layer, "ephemeral_gpu_offload", False):
        return "DoRA with ephemeral_gpu_offload"
    module = layer._modules["lora_magnitude_vector"]._modules[name]
    if type(module).__name__ != "DoraLinearLayer" or origin(type(module).forward) != _LAYERS:
        return f"lora_magnitude_vector is {type(module).__name__}"
    reason = hooks_reason(module)
    if reason is not None:
        return f"lora_magnitude_vector {reason}"
    magnitude = module._parameters.get("weight")
    if type(magnitude) not in PLAIN_TENSORS:
        return f"lora_magnitude_vector's weight is a {type(magnitude).__name__}"
    return magnitude


def call_reason(x: Tensor, call: DoraCall, p: float, impl: str) -> str | None:
    """Return why a call with x is PEFT's to compute, or to refuse; None where it is fused."""
    magnitude = call.magnitude
    if is_dtensor(x):
        return "DoRA of a DTensor"
    if x.ndim == 1:
        return "of one vector PEFT's DoRA gives a matrix of one row"
    if magnitude.dtype not in FLOAT_DTYPES or magnitude.device != x.device:
        return f"lora_magnitude_vector is {magnitude.dtype} on {magnitude.device}"
    reason = inference_reason(magnitude)
    if reason is not None or x.is_cpu or impl != "auto":
        return reason
    rank = call.linear.adapter.a.shape[0]
    return slower_than_peft(Request("lora_dora_linear", x.device, x.dtype, rank, p > 0.0))

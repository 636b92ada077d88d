"""PEFT's layers over bitsandbytes' with a fused forward; imported only where a model has one."""

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from lora_kernels._peft.quantized import QuantizedForward


class FusedLinear4bit(QuantizedForward, Linear4bit):
    """PEFT's `lora.bnb.Linear4bit`, computed by `lora_linear` unless there is a reason not to."""

    _lora_kernels_theirs = Linear4bit


class FusedLinear8bitLt(QuantizedForward, Linear8bitLt):
    """PEFT's `lora.bnb.Linear8bitLt`, likewise; on CUDA devices where it is asked for."""

    _lora_kernels_theirs = Linear8bitLt


FUSED = {Linear4bit: FusedLinear4bit, Linear8bitLt: FusedLinear8bitLt}

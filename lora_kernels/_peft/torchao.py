"""PEFT's layer over torchao's weights with a fused forward; imported only where a model has one."""

from peft.tuners.lora.torchao import TorchaoLoraLinear

from lora_kernels._peft.quantized import QuantizedForward


class FusedTorchaoLinear(QuantizedForward, TorchaoLoraLinear):
    """PEFT's `TorchaoLoraLinear`, computed by `lora_linear` unless there is a reason not to."""

    _lora_kernels_theirs = TorchaoLoraLinear


FUSED = {TorchaoLoraLinear: FusedTorchaoLinear}

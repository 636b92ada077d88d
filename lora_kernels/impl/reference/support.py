"""What this implementation serves, or why not."""

from lora_kernels.operands.request import without_data

SUMMARY = "plain torch, the definition of right, any device"
OPS = {"lora_linear": ("dense",)}  # and the formats of W
refuse = without_data

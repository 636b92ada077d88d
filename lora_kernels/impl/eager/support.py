"""What this implementation serves, or why not."""

from lora_kernels.operands.request import without_data

SUMMARY = "few, in-place ATen calls, any device"
OPS = {"lora_linear": ("dense",)}  # and the formats of W
refuse = without_data

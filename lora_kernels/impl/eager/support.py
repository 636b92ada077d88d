"""What this implementation serves, or why not."""

from lora_kernels.operands.request import Request, unserved, without_data

SUMMARY = "few, in-place ATen calls, any device"
# And the formats of W.
OPS = {
    "lora_linear": ("dense", "nf4", "fp4", "int8", "float8"),
    "lora_dora_linear": ("dense",),
    "lora_embedding": ("dense",),
    "lora_conv": ("dense",),
    "grouped_lora_linear": ("dense",),
    "mixed_lora_linear": ("dense",),
}


def refuse(request: Request) -> str | None:
    """Return why a call can't be served, or None."""
    return unserved(request, OPS) or without_data(request)

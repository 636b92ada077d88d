"""What this implementation serves, or why not."""

from lora_kernels.operands.request import Request, unserved, without_data

SUMMARY = "few, in-place ATen calls, any device"
OPS = {"lora_linear": ("dense",), "lora_dora_linear": ("dense",)}  # and the formats of W


def refuse(request: Request) -> str | None:
    """Return why a call can't be served, or None."""
    return unserved(request, OPS) or without_data(request)

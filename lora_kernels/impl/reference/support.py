"""What this implementation serves, or why not."""

from lora_kernels.operands.request import Request

SUMMARY = "plain torch, the definition of right, any device"
OPS = {"lora_linear": ("dense",)}  # and the formats of W


def refuse(request: Request) -> str | None:
    """Return why a call can't be served, or None."""
    if request.device.type == "meta":
        return "a meta tensor holds no data to compute with"
    return None

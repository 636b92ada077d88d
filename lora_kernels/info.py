"""What this machine offers the package: what `python -m lora_kernels info` prints."""

import json
import platform
from importlib import metadata
from typing import Any

import torch

from lora_kernels.dispatch import IMPLEMENTATIONS, Implementation
from lora_kernels.native import LIBRARIES, absence
from lora_kernels.operands.request import Request

_COMPANIONS = ("triton", "peft", "safetensors", "transformers")
# Of the calls for which it is said what is usable.
_DTYPE, _RANK = torch.float32, 16


def describe() -> str:
    """Return versions, devices, and which implementations are usable or why they are not."""
    found = facts()
    versions = {
        **found["versions"],
        "python": f"{found['versions']['python']} on {found['system']}",
    }
    lines = [f"{name:<13} {version or 'not installed'}" for name, version in versions.items()]
    for part, reason in found["parts"].items():
        built = f"built, {found['isa']} kernels" if part == "cpu" else "built"
        lines.append(f"compiled {part.upper():<4} {reason or built}")
    lines += [f"device        {name:<7} {text}" for name, text in found["devices"].items()]
    summaries = {implementation.name: implementation.summary for implementation in IMPLEMENTATIONS}
    for device, reasons in found["implementations"].items():
        for name, reason in reasons.items():
            state = f"not usable: {reason}" if reason else f"usable: {summaries[name]}"
            lines.append(f"{device:<5} {name:<10} {state}")
    return "\n".join(lines)


def as_json() -> str:
    """Return the same as JSON, by `facts`."""
    return json.dumps(facts(), indent=1)


def facts() -> dict[str, Any]:
    """Return what `describe` says.

    versions: of packages; None: not installed. parts, implementations: why a compiled part is
    absent, why an implementation isn't usable on a device; None: it is there, it is usable.
    """
    import lora_kernels

    devices = _devices()
    return {
        "versions": {
            "lora_kernels": lora_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in _COMPANIONS},
        },
        "system": f"{platform.machine()} {platform.system()}",
        "parts": {part: absence(part) for part in LIBRARIES},
        "isa": None if absence("cpu") else torch.ops.lora_kernels.cpu_isa(),
        "devices": devices,
        "implementations": {
            device: {each.name: _refusal(each, device) for each in IMPLEMENTATIONS}
            for device in devices
        },
    }


def _refusal(implementation: Implementation, device: str) -> str | None:
    return implementation.refuse(Request("lora_linear", torch.device(device), _DTYPE, _RANK, False))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{torch.get_num_threads()} threads, {capability}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices

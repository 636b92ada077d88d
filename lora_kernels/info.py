"""What this machine offers the package: the text of `python -m lora_kernels info`."""

import platform
from importlib import metadata

import torch

from lora_kernels._native import absence
from lora_kernels.dispatch import IMPLEMENTATIONS, Problem

_COMPANIONS = ("triton", "peft", "safetensors", "transformers")


def describe() -> str:
    """Return versions, devices, and which implementations are usable or why they are not."""
    import lora_kernels

    lines = [
        f"lora_kernels  {lora_kernels.__version__}",
        f"python        {platform.python_version()} on {platform.machine()} {platform.system()}",
        f"torch         {torch.__version__}",
    ]
    lines += [f"{name:<13} {_version(name)}" for name in _COMPANIONS]
    isa = None if absence("cpu") else torch.ops.lora_kernels.cpu_isa()
    lines.append(f"compiled CPU  {absence('cpu') or f'built, {isa} kernels'}")
    lines.append(f"compiled CUDA {absence('cuda') or 'built'}")
    devices = _devices()
    lines += [f"device        {name:<7} {text}" for name, text in devices.items()]
    for device in devices:
        problem = Problem(torch.device(device), torch.float32, 16, False)
        for implementation in IMPLEMENTATIONS:
            reason = implementation.refuse(problem)
            state = f"not usable: {reason}" if reason else f"usable: {implementation.summary}"
            lines.append(f"{device:<5} {implementation.name:<10} {state}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{torch.get_num_threads()} threads, {capability}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices

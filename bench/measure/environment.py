"""Where, when and with which versions numbers are taken."""

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lora_kernels.info import describe

COMPANIONS = ("torch", "peft", "lora_kernels", "triton", "unsloth", "lorafusion", "liger-kernel")
# Where the system doesn't say: as much as any core is likely to find near it.
UNKNOWN_CACHE = 32 << 20


def describe_run(device: str) -> dict[str, Any]:
    """Return machine, versions, usable implementations, git revision and date."""
    return {
        "machine": {**_cpu(), **(_gpu() if device == "cuda" else {})},
        "versions": {"python": platform.python_version(), **_versions()},
        "implementations": describe().splitlines(),
        "revision": git_revision(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def machine_name(run: dict[str, Any]) -> str:
    """Return the machine of `describe_run` in one line."""
    machine = run["machine"]
    if "gpu" in machine:
        return f"{machine['gpu']}, driver {machine['driver']}"
    threads = machine["threads"]
    return (
        f"{machine['cpu']} ({machine.get('architecture') or machine['isa']}), "
        f"{machine['cores']} cores, {threads} thread{'s' if threads > 1 else ''}"
    )


def cache_bytes(device: str) -> int:
    """Return the size of the last cache before memory."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().rstrip("K\n")) << 10 for size in sizes), default=UNKNOWN_CACHE)


def _cpu() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    fields = dict(re.findall(r"^(model name|cpu family)\s*: (.*)$", text, re.MULTILINE))
    cpu = fields.get("model name", platform.processor())
    # The cloud's name of these processors doesn't say which they are.
    zen = {"25": "Zen 3 or 4", "26": "Zen 5"}.get(fields.get("cpu family", ""))
    isa = torch.backends.cpu.get_cpu_capability()
    return {
        "cpu": cpu,
        "architecture": f"{zen}, {isa}" if zen and "AMD" in cpu else isa,
        "cores": os.cpu_count(),
        "isa": isa,
        "threads": torch.get_num_threads(),
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _output_of(query) or "unknown",
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in COMPANIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # most are optional
            continue
    return versions


def git_revision() -> str:
    """Return the checkout's revision, with "-dirty" where it has changes."""
    return _output_of(["git", "describe", "--always", "--dirty", "--exclude=*"]) or "unknown"


def _output_of(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # no such program, or it has no answer
        return None
    return done.stdout.strip()

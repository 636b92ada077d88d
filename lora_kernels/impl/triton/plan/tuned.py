"""Plans measured by `python -m lora_kernels tune`; without its file the cost model decides.

The file is `<device name>-<package version>.json`, in the folder that LORA_KERNELS_TUNED names or
in lora_kernels/tuned of the user's cache. It is read once per device and process.
"""

import json
import os
import re
from dataclasses import asdict, replace
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from lora_kernels._version import __version__
from lora_kernels.impl.triton.plan.config import Config, Problem
from lora_kernels.impl.triton.plan.device import Device
from lora_kernels.impl.triton.plan.plan import (
    Plan,
    library_plan,
    may_serve,
    plan,
    plan_of,
    rounded,
)

ENVIRONMENT = "LORA_KERNELS_TUNED"


class Measured(NamedTuple):
    """What was fastest, None for the library plan, its seconds, and those of PEFT's operators."""

    config: Config | None
    seconds: float
    peft: float | None = None


def path_of(device: Device) -> Path:
    """Return the file that holds a device's measured plans, whether it exists or not."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-")
    return _folder() / f"{name}-{__version__}.json"


def _folder() -> Path:
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    from platformdirs import user_cache_path

    return user_cache_path("lora_kernels", appauthor=False) / "tuned"


def key_of(problem: Problem) -> str:
    """Return the name of a layer in the file; M counts as the next power of two."""
    m, n, k, r, bits, dropout, aligned, backward, *_ = rounded(problem)
    of = "" if problem.form == "dense" else f" {problem.form}"
    of += " DoRA" if problem.gain else ""
    return (
        f"{'backward' if backward else 'forward'} {m}x{n}x{k}x{r} {bits}-bit "
        f"{'dropout' if dropout else 'no dropout'} {'aligned' if aligned else 'unaligned'}{of}"
    )


@lru_cache(maxsize=4096)
def planned(problem: Problem, device: Device) -> Plan:
    """Return the measured plan of a layer, or else the predicted one.

    So it is if there is no measured one, or if that may not serve the layer, or if it is slower
    than PEFT's own launches.

    Raises:
        ValueError: the file is not what `tune` writes; or as `plan`.
    """
    entry = _read(path_of(device)).get(key_of(problem))
    if entry is None:
        return plan(problem, device)
    problem = rounded(problem)  # as it was measured
    config, seconds, peft = entry
    if config is None:
        return replace(library_plan(problem, device), seconds=seconds, measured=True)
    measured = replace(plan_of(config, problem, device), seconds=seconds, measured=True)
    if not may_serve(config, problem, device) or seconds > (peft or measured.predicted.peft):
        return plan(problem, device)
    return measured


def write(path: Path, device: Device, found: dict[str, Measured]) -> None:
    """Add measured plans to a file; it is replaced as a whole, so no reader sees half of it."""
    plans = {**_read(path), **found}
    text = {
        "device": device.name,
        "triton": metadata.version("triton"),
        "plans": {
            key: {
                "config": None if config is None else asdict(config),
                "seconds": seconds,
                "peft": peft,
            }
            for key, (config, seconds, peft) in sorted(plans.items())
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(text, indent=1) + "\n")
    temporary.replace(path)
    _read.cache_clear()
    planned.cache_clear()


def _measured(entry: dict[str, Any]) -> Measured:
    fields, peft = entry["config"], entry.get("peft")
    config = None if fields is None else Config(**fields)
    return Measured(config, float(entry["seconds"]), None if peft is None else float(peft))


@cache
def _read(path: Path) -> dict[str, Measured]:
    if not path.exists():
        return {}
    try:
        plans: dict[str, Any] = json.loads(path.read_text())["plans"]
        return {key: _measured(entry) for key, entry in plans.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected plans as `python -m lora_kernels tune` writes them, got {error!r}; "
            "delete the file or tune again"
        ) from error

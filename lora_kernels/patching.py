"""Patch and unpatch the LoRA layers of a PEFT model."""

import re
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, cast

from torch import nn

from lora_kernels.dispatch import check_impl
from lora_kernels.prepack import PrepackReport, prepack_

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer


@dataclass(frozen=True)
class PatchReport:
    """What `patch_peft` did: paths of layers now fused, and of layers left with the reason.

    A layer that is left for its present state (merged, disabled, several active adapters, ...) is
    fused as soon as that state ends; one that is left for its type keeps PEFT's forward.
    """

    patched: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    prepack: PrepackReport | None = None

    def __str__(self) -> str:
        lines = [f"lora_kernels: {len(self.patched)} LoRA layers patched, {len(self.left)} left"]
        by_reason: dict[str, list[str]] = {}
        for path, reason in self.left.items():
            by_reason.setdefault(reason, []).append(path)
        for reason, paths in by_reason.items():
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            lines.append(f"  left ({reason}): {', '.join(paths[:3])}{more}")
        if self.prepack is not None:
            lines.append(str(self.prepack))
        return "\n".join(lines)


def patch_peft(model: nn.Module, *, impl: str = "auto", prepack: bool = False) -> PatchReport:
    """Make a PEFT model's LoRA linear layers compute with `lora_linear`, layer by layer, in place.

    Parameters, names, hooks and dictionaries stay the same objects: only the class of each
    `peft.tuners.lora.Linear` changes. Whether a call is fused is decided at that call, since
    adapters are switched, merged and added after patching; otherwise PEFT's own forward runs. A
    second call renews `impl` and the report.

    Args:
        model: a model with PEFT LoRA layers, or one such layer.
        impl: as for `lora_linear`; a named one that can't serve a fused call raises there.
        prepack: also pack the frozen weights, as `prepack_` does; the report then has its report.

    Returns:
        A `PatchReport`; `print(report)` is readable.

    Raises:
        ImportError: peft is not installed, or older than 0.18.
        TypeError, ValueError: `model` is no module or has no LoRA layer, or `impl` is unknown.
            The model is as it was, after any failure.
    """
    check_impl(impl)
    _check_peft_version()
    from lora_kernels._peft_layer import FusedLinear, Linear, left_reason

    layers = _lora_layers(model)
    if not layers:
        raise ValueError(
            "model: expected a model with PEFT LoRA layers, got none in "
            f"{type(model).__name__} (call peft.get_peft_model first)"
        )
    report, replicated = PatchReport(), _replicated(model)
    before = [(layer, type(layer), vars(layer).get("_lora_kernels_impl")) for _, layer in layers]
    try:
        for path, layer in layers:
            if type(layer) not in (Linear, FusedLinear):
                report.left[path] = f"{_qualified_name(layer)} has no fused forward"
            elif "forward" in vars(layer):
                report.left[path] = "its forward was replaced on the instance"
            else:
                _become(layer, FusedLinear, impl)
                reason = left_reason(cast(FusedLinear, layer)) or replicated.get(id(layer))
                if reason is None:
                    report.patched.append(path)
                else:
                    report.left[path] = reason
    except BaseException:
        for layer, kind, old_impl in before:
            _become(layer, kind, old_impl)
        raise
    # Last, since nothing can fail after it: the packed copies are none of the model's own.
    return replace(report, prepack=prepack_(model)) if prepack else report


def unpatch_peft(model: nn.Module) -> int:
    """Give every patched layer its PEFT class back; an unpatched model is left as it is.

    Args:
        model: a model that `patch_peft` patched, or any other module.

    Returns:
        The number of layers that were patched.

    Raises:
        ImportError: peft is not installed.
        TypeError: `model` is no module.
    """
    from lora_kernels._peft_layer import FusedLinear, Linear

    patched = [layer for _, layer in _lora_layers(model) if type(layer) is FusedLinear]
    for layer in patched:
        _become(layer, Linear, None)
    return len(patched)


def _check_peft_version() -> None:
    """Raise ImportError for a PEFT whose layers the fused forward was not made for."""
    try:
        installed = version("peft")
    except PackageNotFoundError:
        return  # without a distribution, or not there: its import says so
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers and tuple(map(int, numbers.groups())) < (0, 18):
        raise ImportError(f"peft: expected version 0.18 or newer, got {installed}")


def _lora_layers(model: nn.Module) -> list[tuple[str, "LoraLayer"]]:
    from peft.tuners.lora.layer import LoraLayer

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LoraLayer)]


def _replicated(model: nn.Module) -> dict[int, str]:
    """Return the reason, by id, for the modules that a DataParallel copies to several devices."""
    wrappers = [
        m for m in model.modules() if isinstance(m, nn.DataParallel) and len(m.device_ids) > 1
    ]
    reason = "replicas of torch.nn.DataParallel keep PEFT's forward"
    return {id(m): reason for wrapper in wrappers for m in wrapper.modules()}


def _become(layer: "LoraLayer", kind: type, impl: str | None) -> None:
    layer.__class__ = kind
    if impl is None:
        vars(layer).pop("_lora_kernels_impl", None)
        vars(layer).pop("_lora_kernels_packed", None)
    else:
        vars(layer)["_lora_kernels_impl"] = impl


def _qualified_name(layer: "LoraLayer") -> str:
    kind = type(layer)
    return f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__qualname__}"

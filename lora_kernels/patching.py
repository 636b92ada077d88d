"""Patch and unpatch the LoRA layers of a PEFT model."""

import re
import sys
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lora_kernels.bypass import read_linear
from lora_kernels.casting import CastReport, cast_weights_, check_cast_dtype
from lora_kernels.copies import state_of_copies
from lora_kernels.dispatch import check_impl, has_op
from lora_kernels.nn.adapted import Adapted
from lora_kernels.operands.call import autocast_dtype
from lora_kernels.operands.request import Request
from lora_kernels.prepack import PrepackReport, prepack_
from lora_kernels.quantized import request_of_base
from lora_kernels.serving import check_serves, missed_part, request_of_weight, served
from lora_kernels.summary import Group, Summary, grouped
from lora_kernels.usage import LOGGER, Calls, LayerUse, UsageReport, by_implementation, run_by
from lora_kernels.wrappers import loaded

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer


@dataclass(frozen=True)
class PatchReport(Summary):
    """What `patch_peft` did: paths of layers now fused, and of layers left with the reason.

    A layer that is left for its present state (merged, disabled, no active adapter, ...) is
    fused as soon as that state ends; one that is left for its type keeps PEFT's forward.

    Attributes:
        patched: paths of layers now fused.
        left: paths of the others, with the reason.
        prepack: the report of `prepack_` where it was asked for, else None.
        implementations: what the patched layers run by, such as "cpu (avx2)", where they are now
            and in their weights' dtype, or that of an autocast around it; a layer on meta, or
            in shards of FSDP1 or ZeRO-3, doesn't say.
        without_kernel: why that is none of the package's kernels, where it isn't.
        cast_weights: the report of `cast_weights_` where it was asked for, else None.

    Example:
        >>> print(lk.PatchReport(["q_proj", "v_proj"], {"embed": "lora.layer.Embedding"}))
        lora_kernels: 2 LoRA layers patched, 1 left
          left (lora.layer.Embedding): embed
    """

    patched: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    prepack: PrepackReport | None = None
    # The model's part of the report is alike on any machine; the rest is the machine's.
    implementations: dict[str, str] = field(default_factory=dict, compare=False)
    without_kernel: dict[str, str] = field(default_factory=dict, compare=False)
    cast_weights: CastReport | None = None

    def __str__(self) -> str:
        more = [f"\n{found}" for found in (self.cast_weights, self.prepack) if found is not None]
        return super().__str__() + "".join(more)

    def _repr_html_(self) -> str:
        found = (self.cast_weights, self.prepack)
        return super()._repr_html_() + "".join(f._repr_html_() for f in found if f is not None)

    def _headline(self) -> str:
        by = run_by(self.implementations.values())
        return (
            f"lora_kernels: {len(self.patched)} LoRA layers patched, {len(self.left)} left"
            f"{by and f'; {by}'}"
        )

    def _groups(self) -> list[Group]:
        run = by_implementation(self.implementations, self.without_kernel)
        return run + grouped("left", self.left)


def patch_peft(
    model: nn.Module,
    *,
    impl: str = "auto",
    prepack: bool = False,
    cast_weights: bool | torch.dtype = False,
    int8: str | None = None,
    fp8: str | None = None,
) -> PatchReport:
    """Make a PEFT model's LoRA layers compute with this package's functions, in place.

    Parameters, names, hooks and dictionaries stay the same objects: only the class of each
    `peft.tuners.lora.Linear` changes, of its layers over weights that bitsandbytes or torchao
    quantised, and of those of embeddings, convolutions and experts. Whether a call is fused is
    decided at that call, since adapters are switched, merged and added after patching; otherwise
    PEFT's own forward runs, and the logger "lora_kernels" warns once of each reason. `report` tells
    later what became of calls.
    Layers of adapters that a PeftModel adds later are fused, too. A second call renews `impl` and
    the report. The logger gets the report's first line at INFO, and a WARNING where no layer is
    patched or a compiled part is missed.

    Args:
        model: a model with PEFT LoRA layers, or one such layer.
        impl: as for `lora_linear`. A named one has to serve the layers where they are and in their
            dtype: move and cast the model first. Layers on meta, and shards, are not asked: there,
            and for what changes later, a fused call that it can't serve raises. Embeddings,
            convolutions and experts, where it doesn't have the op at all, are left.
        prepack: also pack the frozen weights, as `prepack_` does; the report then has its report.
        cast_weights: also hold a copy of each frozen float32 weight, as `cast_weights_` does, in
            that dtype of 16 bits; True stands for that of an autocast around it, or torch.bfloat16.
        int8: "weights" fuses layers over `Linear8bitLt` on CUDA devices, too, whose own forward
            quantises x to int8 besides; a fused call doesn't.
        fp8: "weights" fuses layers over transformers' `FP8Linear`, likewise.

    Returns:
        A `PatchReport`; `print(report)` is readable.

    Raises:
        ImportError: peft is not installed, or older than 0.18.
        TypeError, ValueError: `model` is no module or has no LoRA layer, or `impl` is unknown or
            can't serve the layers, or `int8`, `fp8` or `cast_weights` is unknown. The model is as
            it was, after any failure.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Embedding(4, 8, max_norm=1.0))
        >>> model = get_peft_model(base, LoraConfig(target_modules=["0", "2"]))
        >>> found = lk.patch_peft(model)
        >>> found.patched, list(found.left)
        (['base_model.model.0'], ['base_model.model.2'])
    """
    check_impl(impl)
    asked = _options(int8=int8, fp8=fp8)
    if not isinstance(cast_weights, bool):
        check_cast_dtype(cast_weights, "cast_weights")
    _check_peft_version()
    from lora_kernels._peft import linear as ours

    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"model: expected a model with PEFT LoRA layers, got {_instead(model)}")
    requests = _requests(layers, impl)
    check_serves(impl, requests)
    found = PatchReport()
    tuners = [m for m in model.modules() if type(m) in (ours.LoraModel, ours.FusedLoraModel)]
    before = [(m, type(m), dict(vars(m))) for m in (*tuners, *(layer for _, layer in layers))]
    told: set[str] = set()
    try:
        for path, layer in layers:
            reason = _left_for_its_type(layer, impl)
            if reason is None:
                kind = cast(type, ours.fused_kind(layer))
                ours.become(layer, kind, ours.Patched(impl, asked), path, told)
                reason = ours.left_reason(layer)
            elif ours.is_fused(layer):  # by an earlier call, for another implementation
                ours.become(layer, cast(Any, type(layer))._lora_kernels_theirs, None)
            if reason is None:
                found.patched.append(path)
            else:
                found.left[path] = reason
        for tuner in tuners:
            ours.become(tuner, ours.FusedLoraModel, ours.Patched(impl, asked))
        _tell(found, impl, requests)
    except BaseException:
        for module, kind, attributes in before:
            module.__class__ = kind
            for name in ours.OWN_ATTRIBUTES:
                vars(module).pop(name, None)
            vars(module).update({k: v for k, v in attributes.items() if k in ours.OWN_ATTRIBUTES})
        raise
    # Last, since nothing can fail after it: copies are none of the model's own.
    if cast_weights:
        found = replace(found, cast_weights=cast_weights_(model, _dtype_of(cast_weights, layers)))
    return replace(found, prepack=prepack_(model)) if prepack else found


def unpatch_peft(model: nn.Module) -> int:
    """Give every patched layer its PEFT class back; an unpatched model is left as it is.

    Args:
        model: a model that `patch_peft` patched, or any other module.

    Returns:
        The number of layers that were patched.

    Raises:
        ImportError: peft is not installed.
        TypeError: `model` is no module.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
        >>> len(lk.patch_peft(model).patched), lk.unpatch_peft(model), lk.unpatch_peft(model)
        (1, 1, 0)
    """
    from lora_kernels._peft import linear as ours

    patched = [layer for _, layer in lora_layers(model) if ours.is_fused(layer)]
    for layer in patched:
        ours.become(layer, cast(Any, type(layer))._lora_kernels_theirs, None)
    for tuner in model.modules():
        if type(tuner) is ours.FusedLoraModel:
            ours.become(tuner, ours.LoraModel, None)
    return len(patched)


def report(model: nn.Module) -> UsageReport:
    """Say what became of the calls of a model's LoRA layers since they were patched or made.

    A layer is counted at each eager call: fused, or left to its unfused forward, with the reason.
    Calls inside compiled graphs aren't seen. LoRA layers that no call of `patch_peft` took are
    named.

    Args:
        model: a model with adapted layers of this package, or PEFT LoRA layers, patched or not.

    Returns:
        A `UsageReport`; `print(report)` is readable.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has neither.

    Example:
        >>> model = nn.Sequential(lk.LoRALinear(8, 8))
        >>> y = model(torch.ones(1, 8))
        >>> use = lk.report(model).layers["0"]
        >>> use.fused, use.left, use.state
        (1, 0, None)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    layers, compiled = {}, any(map(_is_compiled, model.modules()))
    for path, layer in model.named_modules():
        if isinstance(layer, Adapted) or _is_peft_layer(layer):
            layers[path] = _use_of(layer, compiled)
    if not layers:
        raise ValueError(f"model: expected one with LoRA layers, got {_instead(model)}")
    return UsageReport(layers)


def _is_peft_layer(layer: nn.Module) -> bool:
    # Asked by name: without PEFT's classes in the process no layer is one of them.
    lora = sys.modules.get("peft.tuners.lora.layer")
    return lora is not None and isinstance(layer, lora.LoraLayer)


def _is_compiled(module: nn.Module) -> bool:
    wrapper = loaded("torch._dynamo.eval_frame", "OptimizedModule")
    return isinstance(module, wrapper) or module._compiled_call_impl is not None


def _use_of(layer: nn.Module, compiled: bool) -> LayerUse:
    """Return what a layer's own record says, and what serves its next call.

    compiled: whether a call may be part of a graph, which takes no packed copies.
    """
    calls, state = vars(layer).get("_lora_kernels_calls") or Calls(), _state_of(layer)
    request, by, without = None, None, None
    if isinstance(layer, Adapted):
        impl = layer.impl
        op = "lora_dora_linear" if getattr(layer, "use_dora", False) else layer._lora_kernels_op
        request = request_of_base(layer.base_layer, layer.r, False, op)
    elif state is None:
        impl, request = vars(layer)["_lora_kernels_impl"], _request_of(cast(Any, layer))
    if state is None and request is not None:
        by, without = served(impl, request)
    read = read_linear(getattr(layer, "base_layer", layer))
    weight = None if isinstance(read, str) else read[0]
    by_graphs = compiled and not calls.fused
    copies = state_of_copies(layer, weight, "compiled graphs" if by_graphs else by)
    return LayerUse(calls.fused, calls.left, state, calls.reason, copies, by, without)


def _state_of(layer: nn.Module) -> str | None:
    """Return why a call would be left now, as far as the layer itself says."""
    if isinstance(layer, Adapted):
        return "merged" if layer.merged else layer.left_reason()
    from lora_kernels._peft.linear import left_reason

    if hasattr(layer, "_lora_kernels_theirs"):  # FSDP2 makes classes of its own of ours
        return left_reason(layer)
    return _left_for_its_type(cast(Any, layer)) or "not patched: call patch_peft again"


def _requests(layers: list[tuple[str, "LoraLayer"]], impl: str) -> dict[str, Request]:
    """Return what calls of the layers will ask that can be fused, by path, where that is known."""
    kept = [(path, layer) for path, layer in layers if not _left_for_its_type(layer, impl)]
    asked = {path: _request_of(layer) for path, layer in kept}
    return {path: request for path, request in asked.items() if request is not None}


def _request_of(layer: "LoraLayer") -> Request | None:
    from lora_kernels._peft.linear import fused_kind

    op = fused_kind(layer)._lora_kernels_op
    adapters = layer.lora_embedding_A if op == "lora_embedding" else layer.lora_A
    names = [name for name in layer.active_adapters if name in adapters] or [*adapters]
    if not names:
        return None
    # PEFT's embedding has a dropout, and ignores it.
    p = 0.0 if op == "lora_embedding" else getattr(layer.lora_dropout[names[0]], "p", 0.0)
    if op == "lora_linear" and layer.use_dora.get(names[0]):
        op = "lora_dora_linear"
    if op == "grouped_lora_linear":
        return request_of_weight(cast(Any, layer).get_param(), layer.r[names[0]], False, op)
    return request_of_base(layer.get_base_layer(), layer.r[names[0]], p > 0.0, op)


def _tell(found: PatchReport, impl: str, requests: dict[str, Request]) -> None:
    """Add to a report what the patched layers run by, and log what it says."""
    asked = {path: requests[path] for path in found.patched if path in requests}
    for path, request in asked.items():
        found.implementations[path], without = served(impl, request)
        if without is not None:
            found.without_kernel[path] = without
    if found.patched:
        LOGGER.info(found._headline())
    else:
        reasons = (f"{group.reason} ({len(group.paths)})" for group in grouped("", found.left))
        LOGGER.warning("0 of %d LoRA layers patched: %s", len(found.left), "; ".join(reasons))
    missed = missed_part(asked.values()) if impl == "auto" else None
    if missed is not None:
        LOGGER.warning(missed)


def _left_for_its_type(layer: "LoraLayer", impl: str = "auto") -> str | None:
    """Return why a layer can't be fused whatever its state, or None."""
    from lora_kernels._peft.linear import fused_kind
    from lora_kernels._peft.variants import layer_reason

    kind = fused_kind(layer)
    if kind is None:
        return layer_reason(layer)
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    # Whoever names an implementation means it for linear layers.
    op = kind._lora_kernels_op
    return None if has_op(impl, op) else f"{impl!r} has no {op}"


def _options(**asked: str | None) -> tuple[str, ...]:
    """Return the formats whose layers are computed with W in x's dtype on request."""
    for name, value in asked.items():
        if value not in (None, "weights"):
            raise ValueError(f'{name}: expected None or "weights", got {value!r}')
    return tuple(name for name, value in asked.items() if value is not None)


def _dtype_of(cast_weights: bool | torch.dtype, layers: list[tuple[str, "LoraLayer"]]) -> Any:
    """Return the dtype of copies: that of an autocast that is on, or bfloat16, where not said."""
    if not isinstance(cast_weights, bool):
        return cast_weights
    weight = getattr(layers[0][1].get_base_layer(), "weight", None)
    asked = autocast_dtype(weight) if isinstance(weight, Tensor) else None
    return asked or torch.bfloat16


def _check_peft_version() -> None:
    """Raise ImportError for a PEFT whose layers the fused forward was not made for."""
    try:
        installed = version("peft")
    except PackageNotFoundError:
        return  # without a distribution, or not there: its import says so
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers and tuple(map(int, numbers.groups())) < (0, 18):
        raise ImportError(f"peft: expected version 0.18 or newer, got {installed}")


def lora_layers(model: nn.Module) -> list[tuple[str, "LoraLayer"]]:
    """Return a model's PEFT LoRA layers with their paths."""
    from peft.tuners.lora.layer import LoraLayer

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LoraLayer)]


def _instead(model: nn.Module) -> str:
    """Return what a model without LoRA layers is, and what to do about it."""
    # PEFT keeps the configurations on its models, and on those whose layers it replaced.
    kept = (getattr(module, "peft_config", None) for module in model.modules())
    configs = next((found for found in kept if isinstance(found, dict)), {})
    kinds = {getattr(config.peft_type, "value", config.peft_type) for config in configs.values()}
    if not kinds:
        return (
            f"none in {type(model).__name__} (call peft.get_peft_model first; merge_and_unload "
            "takes the layers away)"
        )
    if "LORA" in kinds:
        return f"none in {type(model).__name__}: its LoRA layers were merged and unloaded"
    return f"a PEFT model without LoRA layers ({', '.join(sorted(kinds))})"

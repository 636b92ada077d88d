"""Save and load adapters of LoRALinear models in PEFT's on-disk layout, without peft."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_kernels.adapter_layout import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    Weights,
    check_complete,
    config_of,
    join,
    lora_layers,
    own_tensor,
    pattern_value,
    read_adapter,
    tensors_of,
)
from lora_kernels.checks import FLOAT_DTYPES, check_memory, is_dtensor
from lora_kernels.nn.adapted import Adapted
from lora_kernels.nn.arguments import check_linear, check_settings
from lora_kernels.nn.linear import LoRALinear
from lora_kernels.wrappers import (
    Place,
    find,
    gathered,
    loaded,
    reducer_around,
    replace,
    share,
    unwrapped,
)

# What an adapter's file sets of a LoRALinear beside its weights.
_SETTINGS = ("lora_alpha", "lora_dropout", "use_rslora", "bias_mode")
# What DeepSpeed sets on parameters of which it keeps another copy.
_DEEPSPEED = ("ds_id", "_hp_mapping", "_z3_optimizer")


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of a model's LoRALinear layers as PEFT would.

    Args:
        model: a module with LoRALinear layers, whose paths become the keys. Wrappers (of
            torch.compile, DistributedDataParallel, activation checkpointing, FSDP, ...) are no
            part of a path. Sharded adapters are gathered: all ranks have to call.
        directory: made if absent. Both files are written under temporary names and moved into
            place, so a failure leaves what was there. Several ranks may write to one directory.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: no LoRALinear layer, an adapted embedding or convolution, whose files aren't
            written yet, a PEFT model, an adapter without values (on the meta
            device), or settings that differ from layer to layer where PEFT's layout has one value
            (lora_dropout, use_rslora, bias).

    Precision: tensors are written in the dtype that they have.

    Example:
        >>> model = nn.Sequential(lk.LoRALinear(8, 4, r=2))
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lk.save_adapter(model, folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    from safetensors.torch import save_file

    _check_not_peft(model, "model.save_pretrained")
    layers = lora_layers(model)
    others = [
        (path, type(m).__name__)
        for path, m in model.named_modules()
        if isinstance(m, Adapted) and not isinstance(m, LoRALinear)
    ]
    if others:
        raise ValueError(
            f"model: expected adapters of linear layers alone, got a {others[0][1]} at "
            f"{others[0][0]!r} (keep its state_dict)"
        )
    if not layers:
        raise ValueError(f"model: expected LoRALinear layers, got none in {type(model).__name__}")
    config = config_of(model, layers)
    with gathered(model, write=False):
        tensors = tensors_of(model, layers, config["bias"])
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as draft:
        save_file(tensors, Path(draft, WEIGHTS_NAME), metadata={"format": "pt"})
        Path(draft, CONFIG_NAME).write_text(text)
        _move_into_place(Path(draft), target)


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Read an adapter that `save_adapter` or PEFT wrote into a model's layers.

    A LoRALinear named in the file gets its weights, lora_alpha, lora_dropout, use_rslora and bias
    mode; a plain nn.Linear is replaced by a LoRALinear around it. Everything is checked before
    anything changes.

    Args:
        model: a module whose submodules have the paths in the file, wrapped or not. A sharded
            LoRALinear gets its shards: all ranks have to call. One on the meta device gets an
            adapter with values; its base layer stays there.
        directory: holds adapter_model.safetensors and adapter_config.json.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: a file is absent; pickle files (adapter_model.bin) are not read.
        ValueError: a file that can't be read, a setting or tensor without counterpart in
            LoRALinear, a layer of the model or of target_modules that the file lacks, one that
            the model lacks, shapes that don't fit, a PEFT model, or a model to which a layer can't
            be added any more (an nn.Linear inside DistributedDataParallel or FSDP, DeepSpeed).

    Precision: a LoRALinear keeps its adapter's dtype, to which the file's values are cast; around
    an nn.Linear the adapter has the file's.

    Example:
        >>> import tempfile
        >>> model, plain = nn.Sequential(lk.LoRALinear(8, 4, r=2)), nn.Sequential(nn.Linear(8, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lk.save_adapter(model, folder)
        ...     lk.load_adapter(plain, folder)
        >>> plain[0].lora_A.weight.equal(model[0].lora_A.weight)
        True
    """
    _check_not_peft(model, "model.load_adapter")
    adapter = read_adapter(Path(directory))
    if any(hasattr(p, name) for p in model.parameters() for name in _DEEPSPEED):
        raise ValueError(
            "model: expected parameters that DeepSpeed has not taken over, since it keeps copies "
            "of them (call load_adapter before deepspeed.initialize, outside deepspeed.zero.Init)"
        )
    with gathered(model, write=True):
        check_complete(model, adapter)
        changes = [_plan_layer(model, path, adapter) for path in adapter.layers]
        changes += [_plan_bias(model, path, bias) for path, bias in adapter.biases.items()]
        try:
            for change in changes:
                change.write()
        except BaseException:  # memory that runs out, an interrupt
            for change in changes:
                change.undo()
            raise


class _Change(NamedTuple):
    """What loading does to one layer or tensor, and what takes it back."""

    write: Callable[[], object]
    undo: Callable[[], object]


def _check_not_peft(model: nn.Module, method: str) -> None:
    kinds = (
        loaded("peft.peft_model", "PeftModel"),
        loaded("peft.tuners.tuners_utils", "BaseTunerLayer"),
    )
    if any(isinstance(module, kinds) for module in model.modules()):
        raise ValueError(
            f"model: expected LoRALinear layers, got PEFT's in {type(model).__name__} "
            f"(use {method})"
        )


def _move_into_place(draft: Path, target: Path) -> None:
    """Move both files from draft to target, or neither."""
    weights, old_weights = target / WEIGHTS_NAME, draft / "old"
    if weights.exists():
        shutil.copy2(weights, old_weights)
    try:
        os.replace(draft / WEIGHTS_NAME, weights)
        os.replace(draft / CONFIG_NAME, target / CONFIG_NAME)
    except BaseException:
        if old_weights.exists():
            os.replace(old_weights, weights)
        else:
            weights.unlink(missing_ok=True)
        raise


def _plan_layer(model: nn.Module, path: str, adapter: Adapter) -> _Change:
    """Check one layer's tensors against the model; return what writes them, and its undoing."""
    place, config, weights = find(model, path), adapter.config, adapter.layers[path]
    if place is None:
        raise ValueError(f"model: expected a layer {path!r}, got none")
    layer = place.module
    if not isinstance(layer, LoRALinear | nn.Linear) or (
        place.owner is None and isinstance(layer, nn.Linear)
    ):
        raise ValueError(
            f"model: expected {path!r} to be a LoRALinear or an nn.Linear inside the model, "
            f"got {type(layer).__name__}"
        )
    # What a file leaves out has the default of peft.LoraConfig.
    rank = pattern_value(config.get("rank_pattern"), path, config.get("r", 8))
    shapes = ([rank, layer.in_features], [layer.out_features, rank], [layer.out_features])
    for name, t, shape in zip(weights._fields, weights, shapes, strict=True):
        if t is not None and (list(t.shape) != shape or t.dtype not in FLOAT_DTYPES):
            raise ValueError(
                f"{join(path, name)}: expected floats of shape {shape}, "
                f"got {t.dtype} of shape {list(t.shape)}"
            )
    settings = {
        "lora_alpha": pattern_value(config.get("alpha_pattern"), path, config.get("lora_alpha", 8)),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "bias": config.get("bias", "none"),
    }
    if isinstance(layer, nn.Linear):
        _check_values(path, layer.weight, layer)
    try:
        check_settings(r=rank, adapter_dtype=weights.lora_A.dtype, impl="auto", **settings)
        if isinstance(layer, nn.Linear):
            check_linear(layer, use_dora=weights.magnitude is not None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    settings["use_rslora"] = bool(config.get("use_rslora", False))
    if isinstance(layer, nn.Linear):
        return _plan_wrapping(layer, place, path, weights, settings)
    if layer.use_dora != (weights.magnitude is not None):
        raise ValueError(f"{path}: expected use_dora={layer.use_dora}, got {not layer.use_dora}")
    _check_adapter(layer, path, rank, settings["bias"], reducer_around(place))
    return _plan_filling(layer, path, weights, settings)


def _check_adapter(layer: LoRALinear, path: str, rank: int, bias: str, reducer: str | None) -> None:
    """Check that a LoRALinear is in a state to get a file's adapter."""
    if layer.r != rank:
        raise ValueError(f"{join(path, 'r')}: expected rank {layer.r}, got {rank}")
    if layer.merged:
        raise ValueError(f"model: expected {path!r} unmerged, got a merged layer")
    if reducer and (bias == "none") != (layer.bias_mode == "none"):
        raise ValueError(
            f"{path}: expected bias {layer.bias_mode!r} inside {reducer}, which was told what is "
            f"trained, got {bias!r} (load before wrapping)"
        )


def _check_values(path: str, t: Tensor, module: nn.Module) -> None:
    """Refuse a tensor on the meta device whose values somebody else is about to bring."""
    if t.is_meta and is_dtensor(t):
        raise ValueError(f"{path}: expected values, got shards on the meta device (call to_empty)")
    if t.is_meta and hasattr(module, "_hf_hook"):
        raise ValueError(
            f"{path}: expected values, got a layer that accelerate offloads "
            "(call accelerate.hooks.remove_hook_from_submodules(model) first)"
        )


def _plan_wrapping(
    linear: nn.Linear,
    place: Place,
    path: str,
    weights: Weights,
    settings: dict[str, Any],
) -> _Change:
    """Check that a LoRALinear may be put around an nn.Linear; return what does, and its undoing."""
    reducer = reducer_around(place)
    if reducer or is_dtensor(linear.weight):
        raise ValueError(
            f"model: expected {path!r} to be a LoRALinear inside {reducer or 'a sharded layer'}, "
            f"where ranks would train a new adapter apart, got {type(linear).__name__} "
            "(load before wrapping or sharding)"
        )
    trained = [(p, p.requires_grad) for p in linear.parameters()]
    a, use_dora = weights.lora_A, weights.magnitude is not None

    def write() -> None:
        layer = LoRALinear.from_linear(
            linear, r=a.shape[0], adapter_dtype=a.dtype, use_dora=use_dora, **settings
        )
        for _, module, value in _trained_modules(layer, weights):
            _plan_tensor(module, "weight", value).write()
        replace(place, layer)

    def undo() -> None:
        replace(place, linear)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    return _Change(write, undo)


def _plan_filling(
    layer: LoRALinear, path: str, weights: Weights, settings: dict[str, Any]
) -> _Change:
    """Return what gives a LoRALinear a file's weights and settings, and its undoing."""
    tensors = []
    for name, module, value in _trained_modules(layer, weights):
        bare = unwrapped(module)
        _check_values(join(path, name), module.weight, bare)
        tensors.append(_plan_tensor(bare, "weight", value))
    old = {name: getattr(layer, name) for name in _SETTINGS}
    new = {name: settings.get(name, settings["bias"]) for name in _SETTINGS}
    bias = layer.base_layer.bias
    trained = bias is not None and bias.requires_grad

    def put(values: dict[str, Any], train_bias: bool) -> None:
        for name, value in values.items():
            setattr(layer, name, value)
        if bias is not None:
            bias.requires_grad_(train_bias)

    def write() -> None:
        put(new, new["bias_mode"] != "none")
        for tensor in tensors:
            tensor.write()

    def undo() -> None:
        put(old, trained)
        for tensor in tensors:
            tensor.undo()

    return _Change(write, undo)


def _trained_modules(layer: LoRALinear, weights: Weights) -> list[tuple[str, Any, Tensor]]:
    """Return names and modules of a layer that have a weight in the file, with that."""
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    pairs = zip(names, weights, strict=True)
    return [(name, getattr(layer, name), t) for name, t in pairs if t is not None]


def _plan_bias(model: nn.Module, path: str, value: Tensor) -> _Change:
    """Check one bias against the model; return what writes it, and its undoing."""
    # A bias of a layer that is about to be wrapped has its plain path until then.
    for owner_path in (path.rpartition(".")[0], path.removesuffix(".base_layer.bias")):
        owner = find(model, owner_path)
        bias = own_tensor(owner.module, "bias") if owner is not None else None
        if owner is not None and bias is not None:
            break
    else:
        raise ValueError(f"model: expected a bias at {path!r}, got none")
    if bias.shape != value.shape:
        raise ValueError(f"{path}: expected shape {list(bias.shape)}, got {list(value.shape)}")
    _check_values(path, bias, owner.module)
    return _plan_tensor(owner.module, "bias", value)


def _plan_tensor(module: nn.Module, name: str, value: Tensor) -> _Change:
    """Return what gives a module's parameter or buffer a value, and its undoing."""
    old = getattr(module, name)
    if not old.is_meta:
        check_memory(**{f"{type(module).__name__}.{name}": old})
        # Not under no_grad: an interrupt at the end of such a block would leave gradients disabled.
        target, saved = old.detach(), old.detach().clone()
        return _Change(lambda: target.copy_(share(value, target)), lambda: target.copy_(saved))

    def assign() -> None:
        new = value.to(old.dtype)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(module, name, new)

    return _Change(assign, partial(setattr, module, name, old))

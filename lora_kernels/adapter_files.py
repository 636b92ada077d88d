"""Save and load the adapters of a model in PEFT's on-disk layout, without peft."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from lora_kernels.adapter_experts import adapted_parameters
from lora_kernels.adapter_layers import MAGNITUDE, Kind, kind_of, owner_of, shapes_of, uses_dora
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
from lora_kernels.nn.arguments import check_settings
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

# What an adapter's file sets of a layer that has it, beside its weights.
_SETTINGS = ("lora_alpha", "lora_dropout", "use_rslora", "bias_mode")
# What DeepSpeed sets on parameters of which it keeps another copy.
_DEEPSPEED = ("ds_id", "_hp_mapping", "_z3_optimizer")


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of a model's LoRALinear, Embedding, Conv and Experts layers as PEFT would.

    Args:
        model: a module with adapted layers, whose paths become the keys. Wrappers (of
            torch.compile, DistributedDataParallel, activation checkpointing, FSDP, ...) are no
            part of a path. Sharded adapters are gathered: all ranks have to call.
        directory: made if absent. Both files are written under temporary names and moved into
            place, so a failure leaves what was there. Several ranks may write to one directory.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: no adapted layer, a PEFT model, an adapter without values (on the meta
            device), or settings that differ from layer to layer where PEFT's layout has one value
            (lora_dropout, use_rslora, bias; use_dora, which embeddings and convolutions haven't).

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
    if not layers:
        raise ValueError(f"model: expected LoRA layers, got none in {type(model).__name__}")
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

    An adapted layer named in the file gets its weights, lora_alpha, lora_dropout, use_rslora and
    bias mode; a plain nn.Linear, Embedding, Conv1d to 3d or module of experts is replaced by one
    around it. A base layer's weight, which PEFT adds of adapted embed_tokens and lm_head, is
    written, too. Everything is checked before anything changes.

    Args:
        model: a module whose submodules have the paths in the file, wrapped or not. A sharded
            layer gets its shards: all ranks have to call. One on the meta device gets an adapter
            with values; its base layer stays there.
        directory: holds adapter_model.safetensors and adapter_config.json.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: a file is absent; pickle files (adapter_model.bin) are not read.
        ValueError: a file that can't be read, a setting or tensor without counterpart
            here, a layer of the model or of target_modules that the file lacks, one that
            the model lacks, shapes that don't fit, a PEFT model, or a model to which a layer can't
            be added any more (a plain one inside DistributedDataParallel or FSDP, DeepSpeed).

    Precision: an adapted layer keeps its adapter's dtype, to which the file's values are cast;
    around a plain one the adapter has the file's.

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
        changes += [_plan_other(model, path, value) for path, value in adapter.others.items()]
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
            f"model: expected layers of lora_kernels, got PEFT's in {type(model).__name__} "
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
    layer: Any = place.module
    kind = kind_of(layer)
    if kind is None or (place.owner is None and not isinstance(layer, Adapted)):
        raise ValueError(
            f"model: expected {path!r} to be an adapted layer, or one of torch's to adapt inside "
            f"the model, got {type(layer).__name__}"
        )
    parameters = adapted_parameters(config, path, layer)
    paths = [join(path, name) for name in parameters] or [path]
    # What a file leaves out has the default of peft.LoraConfig.
    rank = pattern_value(config.get("rank_pattern"), paths, config.get("r", 8))
    settings = {
        "lora_alpha": pattern_value(
            config.get("alpha_pattern"), paths, config.get("lora_alpha", 8)
        ),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "bias": config.get("bias", "none"),
    }
    use_dora = MAGNITUDE in weights
    if not isinstance(layer, Adapted):
        _check_values(path, next(layer.parameters(recurse=False)), layer)
    try:
        check_settings(r=rank, adapter_dtype=None, impl="auto", **settings)
        if not isinstance(layer, Adapted):
            kind.check(layer, rank, use_dora)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    _check_tensors(path, weights, shapes_of(layer, rank, use_dora, parameters), layer)
    settings |= {"use_rslora": bool(config.get("use_rslora", False)), "use_dora": use_dora}
    settings |= {"r": rank, "target_parameters": parameters}
    if not isinstance(layer, Adapted):
        return _plan_wrapping(kind, place, path, weights, settings)
    if uses_dora(layer) != use_dora:
        raise ValueError(f"{path}: expected use_dora={not use_dora}, got {use_dora}")
    _check_adapter(layer, path, rank, settings["bias"], reducer_around(place))
    return _plan_filling(layer, path, weights, settings)


def _check_tensors(
    path: str, weights: Weights, shapes: dict[str, list[int]], layer: nn.Module
) -> None:
    """Check that a file's tensors of a layer are those of its kind, by name, shape and dtype."""
    if shapes.keys() != weights.keys():
        raise ValueError(
            f"{path}: expected {', '.join(shapes)} by {type(layer).__name__}, "
            f"got {', '.join(weights)}"
        )
    for part, shape in shapes.items():
        t = weights[part]
        if list(t.shape) != shape or t.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{join(path, part.removesuffix('.weight'))}: expected floats of shape {shape}, "
                f"got {t.dtype} of shape {list(t.shape)}"
            )


def _check_adapter(layer: Any, path: str, rank: int, bias: str, reducer: str | None) -> None:
    """Check that an adapted layer is in a state to get a file's adapter."""
    if layer.r != rank:
        raise ValueError(f"{join(path, 'r')}: expected rank {layer.r}, got {rank}")
    if layer.merged:
        raise ValueError(f"model: expected {path!r} unmerged, got a merged layer")
    mode = getattr(layer, "bias_mode", bias)  # an embedding has none
    if reducer and (bias == "none") != (mode == "none"):
        raise ValueError(
            f"{path}: expected bias {mode!r} inside {reducer}, which was told what is "
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
    kind: Kind, place: Place, path: str, weights: Weights, settings: dict[str, Any]
) -> _Change:
    """Check that an adapter may be put around a layer; return what does, and its undoing."""
    reducer, plain = reducer_around(place), cast(Any, place.module)
    if reducer or any(map(is_dtensor, plain.parameters(recurse=False))):
        raise ValueError(
            f"model: expected {path!r} to be a {kind.adapted.__name__} inside "
            f"{reducer or 'a sharded layer'}, where ranks would train a new adapter apart, "
            f"got {type(plain).__name__} (load before wrapping or sharding)"
        )
    trained = [(p, p.requires_grad) for p in plain.parameters()]
    a, *_ = weights.values()
    taken = {name: settings[name] for name in ("r", *kind.settings)}

    def write() -> None:
        layer = kind.make(plain, adapter_dtype=a.dtype, **taken)
        for part, value in weights.items():
            _plan_tensor(*owner_of(layer, part), value).write()
        replace(place, layer)

    def undo() -> None:
        replace(place, plain)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    return _Change(write, undo)


def _plan_filling(layer: Any, path: str, weights: Weights, settings: dict[str, Any]) -> _Change:
    """Return what gives an adapted layer a file's weights and settings, and its undoing."""
    tensors = []
    for part, value in weights.items():
        owner, name = owner_of(layer, part)
        bare = unwrapped(owner)
        _check_values(join(path, part.removesuffix(".weight")), getattr(owner, name), bare)
        tensors.append(_plan_tensor(bare, name, value))
    old = {name: getattr(layer, name) for name in _SETTINGS if hasattr(layer, name)}
    new = {name: settings.get(name, settings["bias"]) for name in old}
    bias = getattr(layer.base_layer, "bias", None)
    trained = bias is not None and bias.requires_grad

    def put(values: dict[str, Any], train_bias: bool) -> None:
        for name, value in values.items():
            setattr(layer, name, value)
        if bias is not None:
            bias.requires_grad_(train_bias)

    def write() -> None:
        put(new, settings["bias"] != "none")
        for tensor in tensors:
            tensor.write()

    def undo() -> None:
        put(old, trained)
        for tensor in tensors:
            tensor.undo()

    return _Change(write, undo)


def _plan_other(model: nn.Module, path: str, value: Tensor) -> _Change:
    """Check a bias or base weight against the model; return what writes it, and its undoing."""
    owner_path, _, name = path.rpartition(".")
    # That of a layer that is about to be wrapped has its plain path until then.
    for where in (owner_path, owner_path.removesuffix(".base_layer")):
        owner = find(model, where)
        own = own_tensor(owner.module, name) if owner is not None else None
        if owner is not None and own is not None:
            break
    else:
        raise ValueError(f"model: expected a {name} at {path!r}, got none")
    if own.shape != value.shape:
        raise ValueError(f"{path}: expected shape {list(own.shape)}, got {list(value.shape)}")
    _check_values(path, own, owner.module)
    return _plan_tensor(owner.module, name, value)


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

"""Save and load adapters of LoRALinear models in PEFT's on-disk layout, without peft.

adapter_model.safetensors   base_model.model.<path>.lora_A.weight   [r, in_features]
                            base_model.model.<path>.lora_B.weight   [out_features, r]
                            base_model.model.<path>.base_layer.bias with bias "lora_only"
adapter_config.json         the fields of peft.LoraConfig that these layers have
"""

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_kernels.checks import FLOAT_DTYPES
from lora_kernels.nn import LoRALinear, check_linear, check_settings

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
_KEY = re.compile(re.escape(PREFIX) + r"(?:(?P<path>.+)\.)?(?P<part>lora_A\.weight|lora_B\.weight)")
# Settings that change what an adapter computes and that LoRALinear does not have.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
# What an adapter's file sets of a LoRALinear beside its weights.
_SETTINGS = ("lora_alpha", "lora_dropout", "use_rslora", "bias_mode")
# Initialisations with which PEFT changes the base weights, at loading too.
_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of a model's LoRALinear layers as PEFT would.

    Args:
        model: a module with LoRALinear layers, whose paths become the keys.
        directory: made if absent. Both files are written under temporary names and moved into
            place, so a failure leaves what was there.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: no LoRALinear layer, or settings that differ from layer to layer where PEFT's
            layout has one value (lora_dropout, use_rslora, bias).
    """
    from safetensors.torch import save_file

    layers = _lora_layers(model)
    if not layers:
        raise ValueError(f"model: expected LoRALinear layers, got none in {type(model).__name__}")
    config = _config_of(model, layers)
    tensors = _tensors_of(model, layers, config["bias"])
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
        model: a module whose submodules have the paths in the file.
        directory: holds adapter_model.safetensors and adapter_config.json.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: a file is absent; pickle files (adapter_model.bin) are not read.
        ValueError: a file that can't be read, a setting or tensor without counterpart in
            LoRALinear, a missing or additional layer, or shapes that don't fit.
    """
    config, tensors = _read(Path(directory))
    pairs, biases = _parse(tensors)
    missing = sorted(set(_lora_layers(model)) - set(pairs))
    if missing:
        raise ValueError(f"{WEIGHTS_NAME}: expected weights of layer {missing[0]!r}, got none")
    changes = [_plan_layer(model, path, a, b, config) for path, (a, b) in pairs.items()]
    state = model.state_dict(keep_vars=True)
    changes += [_plan_bias(state, path, bias) for path, bias in biases.items()]
    try:
        for change in changes:
            change.write()
    except BaseException:  # memory that runs out, an interrupt
        for change in changes:
            change.undo()
        raise


class _Change(NamedTuple):
    """What loading does to one layer or bias, and what takes it back."""

    write: Callable[[], object]
    undo: Callable[[], object]


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


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _config_of(model: nn.Module, layers: dict[str, LoRALinear]) -> dict[str, Any]:
    shared = {}
    for ours, field in (
        ("lora_dropout", "lora_dropout"),
        ("use_rslora", "use_rslora"),
        ("bias_mode", "bias"),
    ):
        values = {getattr(layer, ours) for layer in layers.values()}
        if len(values) > 1:
            raise ValueError(
                f"{field}: expected one value for all layers, as PEFT's layout has, got {values}"
            )
        shared[field] = values.pop()
    rank, alpha = (
        Counter(getattr(layer, name) for layer in layers.values()).most_common(1)[0][0]
        for name in ("r", "lora_alpha")
    )
    # PEFT takes pattern keys for regular expressions of a path's end unless they begin with ^.
    ranks = {f"^{re.escape(path)}": layer.r for path, layer in layers.items()}
    alphas = {f"^{re.escape(path)}": layer.lora_alpha for path, layer in layers.items()}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        **shared,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": ranks if len(set(ranks.values())) > 1 else {},
        "alpha_pattern": alphas if len(set(alphas.values())) > 1 else {},
        "target_modules": _target_modules(model, layers),
    }


def _target_modules(model: nn.Module, layers: dict[str, LoRALinear]) -> list[str] | str:
    """Return the layers' paths; one regular expression where PEFT's suffix match takes more."""
    others = [path for path, _ in model.named_modules() if path not in layers]
    if any(other.endswith(f".{path}") for path in layers for other in others):
        return "|".join(re.escape(path) for path in layers)
    return sorted(layers)


def _tensors_of(model: nn.Module, layers: dict[str, LoRALinear], bias: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors[_join(path, "lora_A.weight")] = layer.lora_A.weight
        tensors[_join(path, "lora_B.weight")] = layer.lora_B.weight
        if bias == "lora_only" and layer.bias is not None:
            tensors[_join(path, "base_layer.bias")] = layer.bias
    if bias == "all":
        tensors |= {k: v for k, v in model.state_dict().items() if k.split(".")[-1] == "bias"}
    # Cloned, since safetensors refuses tensors that share memory.
    return {PREFIX + key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"directory: expected {name} in {directory}, got none")
    try:
        config = json.loads((directory / CONFIG_NAME).read_text())
        tensors = load_file(directory / WEIGHTS_NAME)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{CONFIG_NAME}: expected JSON, got {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS_NAME}: expected a safetensors file, got {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{CONFIG_NAME}: expected peft_type LORA, got {config!r:.80}")
    for field in _UNSUPPORTED:
        if config.get(field):
            raise ValueError(
                f"{CONFIG_NAME}: {field} has no counterpart in LoRALinear, got {config[field]!r}"
            )
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGING_BASE):
        raise ValueError(
            f"{CONFIG_NAME}: expected an adapter of the unchanged base weights, got "
            f"init_lora_weights {config['init_lora_weights']!r} (PEFT's save_pretrained converts "
            "it with path_initial_model_for_weight_conversion)"
        )
    return config, tensors


def _parse(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Split a file's tensors into (A, B) by layer path and biases by parameter path."""
    parts: dict[str, dict[str, Tensor]] = {}
    biases = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match:
            parts.setdefault(match["path"] or "", {})[match["part"]] = tensor
        elif key.startswith(PREFIX) and key.split(".")[-1] == "bias":
            biases[key.removeprefix(PREFIX)] = tensor
        else:
            raise ValueError(f"{WEIGHTS_NAME}: expected lora_A and lora_B weights, got key {key!r}")
    for path, found in parts.items():
        for part in ("lora_A.weight", "lora_B.weight"):
            if part not in found:
                raise ValueError(f"{WEIGHTS_NAME}: expected {_join(path, part)!r}, got none")
    return {path: (p["lora_A.weight"], p["lora_B.weight"]) for path, p in parts.items()}, biases


def _plan_layer(
    model: nn.Module, path: str, a: Tensor, b: Tensor, config: dict[str, Any]
) -> _Change:
    """Check one layer's tensors against the model; return what writes them, and its undoing."""
    try:
        layer = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"model: expected a layer {path!r}, got none") from error
    if not isinstance(layer, LoRALinear | nn.Linear) or (
        layer is model and isinstance(layer, nn.Linear)
    ):
        raise ValueError(
            f"model: expected {path!r} to be a LoRALinear or an nn.Linear inside the model, "
            f"got {type(layer).__name__}"
        )
    # What a file leaves out has the default of peft.LoraConfig.
    rank = _pattern_value(config.get("rank_pattern"), path, config.get("r", 8))
    shapes = ([rank, layer.in_features], [layer.out_features, rank])
    for name, t, shape in (("lora_A", a, shapes[0]), ("lora_B", b, shapes[1])):
        if list(t.shape) != shape or t.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{_join(path, name)}: expected floats of shape {shape}, "
                f"got {t.dtype} of shape {list(t.shape)}"
            )
    settings = {
        "lora_alpha": _pattern_value(
            config.get("alpha_pattern"), path, config.get("lora_alpha", 8)
        ),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "bias": config.get("bias", "none"),
    }
    try:
        check_settings(r=rank, adapter_dtype=a.dtype, impl="auto", **settings)
        if isinstance(layer, nn.Linear):
            check_linear(layer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    settings["use_rslora"] = bool(config.get("use_rslora", False))
    if isinstance(layer, LoRALinear):
        if layer.r != rank:
            raise ValueError(f"{_join(path, 'r')}: expected rank {layer.r}, got {rank}")
        if layer.merged:
            raise ValueError(f"model: expected {path!r} unmerged, got a merged layer")
    return _Change(
        lambda: _write_layer(model, path, layer, a, b, settings), _undo_of(model, path, layer)
    )


def _undo_of(model: nn.Module, path: str, layer: LoRALinear | nn.Linear) -> Callable[[], None]:
    """Return what brings a layer back to its present state, before anything is written to it."""
    base = layer.base_layer if isinstance(layer, LoRALinear) else layer
    trained = [(p, p.requires_grad) for p in base.parameters()]
    old: dict[str, Any] = {}
    values: list[tuple[Tensor, Tensor]] = []
    if isinstance(layer, LoRALinear):
        old = {name: getattr(layer, name) for name in _SETTINGS}
        weights = (layer.lora_A.weight, layer.lora_B.weight)
        values = [(weight, weight.detach().clone()) for weight in weights]

    def undo() -> None:
        if isinstance(layer, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
        for name, value in old.items():
            setattr(layer, name, value)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for weight, value in values:
            weight.detach().copy_(value)

    return undo


def _write_layer(
    model: nn.Module,
    path: str,
    layer: LoRALinear | nn.Linear,
    a: Tensor,
    b: Tensor,
    settings: dict[str, Any],
) -> None:
    if isinstance(layer, nn.Linear):
        parent, _, name = path.rpartition(".")
        layer = LoRALinear.from_linear(layer, r=a.shape[0], adapter_dtype=a.dtype, **settings)
        setattr(model.get_submodule(parent), name, layer)
    layer.lora_alpha, layer.lora_dropout = settings["lora_alpha"], settings["lora_dropout"]
    layer.use_rslora, layer.bias_mode = settings["use_rslora"], settings["bias"]
    if layer.bias is not None:
        layer.bias.requires_grad_(layer.bias_mode != "none")
    # Not under no_grad: an interrupt at the end of such a block would leave gradients disabled.
    layer.lora_A.weight.detach().copy_(a)
    layer.lora_B.weight.detach().copy_(b)


def _plan_bias(state: dict[str, Tensor], path: str, value: Tensor) -> _Change:
    """Check one bias against the model; return what writes it, and its undoing."""
    bias = state.get(path)
    if bias is None:
        # A bias of a layer that is about to be wrapped has its plain path until then.
        bias = state.get(path.removesuffix(".base_layer.bias") + ".bias")
    if bias is None:
        raise ValueError(f"model: expected a bias at {path!r}, got none")
    if bias.shape != value.shape:
        raise ValueError(f"{path}: expected shape {list(bias.shape)}, got {list(value.shape)}")

    target, old = bias.detach(), bias.detach().clone()
    return _Change(partial(target.copy_, value), partial(target.copy_, old))


def _pattern_value(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """Return the first pattern's value that matches the path as PEFT matches it, else default."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default

"""PEFT's on-disk layout of LoRA adapters: keys and configuration, from layers and back.

adapter_model.safetensors   base_model.model.<path>.lora_A.weight   [r, in_features]
                            base_model.model.<path>.lora_B.weight   [out_features, r]
                            base_model.model.<path>.lora_magnitude_vector of DoRA [out_features]
                            base_model.model.<path>.lora_embedding_A  [r, num_embeddings]
                            base_model.model.<path>.lora_embedding_B  [embedding_dim, r]
                            base_model.model.<path>.lora_A.weight of experts [E · r, K], experts one
                            after the other; lora_B.weight [N, r · E], experts adjacent; of the
                            second last parameter <path>.base_layer.lora_A.weight
                            base_model.model.<path>.base_layer.bias with bias "lora_only"
                            base_model.model.<path>.base_layer.weight, which PEFT adds of adapted
                            embed_tokens and lm_head; it is read and not written
adapter_config.json         the fields of peft.LoraConfig that these layers have
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_kernels.adapter_experts import (
    INSIDE,
    ORIENTED,
    PAIR,
    is_experts,
    parameters_targeted,
)
from lora_kernels.adapter_layers import (
    EMBEDDING_PAIR,
    MAGNITUDE,
    PARTS,
    owner_of,
    shapes_of,
    uses_dora,
)
from lora_kernels.checks import check_memory
from lora_kernels.nn import LoRAExperts
from lora_kernels.nn.adapted import Adapted
from lora_kernels.wrappers import bare_modules, whole

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
_INNER = INSIDE.removesuffix(".")
_KEY = re.compile(
    re.escape(_PREFIX) + rf"(?:(?P<path>.+)\.)?(?P<part>{'|'.join(map(re.escape, PARTS))})"
)
# Settings that change what an adapter computes and that our layers do not have. fan_in_fan_out
# is none: PEFT sets it to False for an nn.Linear, too.
_UNSUPPORTED = (
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
# Initialisations with which PEFT changes the base weights, at loading too.
_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What PEFT adapts where target_modules match it.
_TARGETS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)

Weights = dict[str, Tensor]  # a layer's tensors by part


class Adapter(NamedTuple):
    """What the two files say: settings, weights by layer path, others by parameter path.

    others: biases, and weights of base layers.
    """

    config: dict[str, Any]
    layers: dict[str, Weights]
    others: dict[str, Tensor]


def lora_layers(model: nn.Module) -> dict[str, Adapted]:
    """Return a model's adapted layers by their paths without wrappers."""
    return {path: m for path, m in bare_modules(model, Adapted) if isinstance(m, Adapted)}


def join(path: str, name: str) -> str:
    """Return the path of what is called `name` in the module at `path`."""
    return f"{path}.{name}" if path else name


def config_of(model: nn.Module, layers: dict[str, Adapted]) -> dict[str, Any]:
    """Return the fields of adapter_config.json; ValueError where layers need several values."""
    shared: dict[str, Any] = {}
    for ours, field, default in (
        ("lora_dropout", "lora_dropout", 0.0),
        ("use_rslora", "use_rslora", False),
        ("use_dora", "use_dora", False),
        ("bias_mode", "bias", "none"),
    ):
        # An embedding has no dropout and no bias, but DoRA would have to be its own, too.
        having = [m for m in layers.values() if field == "use_dora" or hasattr(m, ours)]
        values = {getattr(layer, ours, default) for layer in having} or {default}
        if len(values) > 1:
            raise ValueError(
                f"{field}: expected one value for all layers, as PEFT's layout has, got {values}"
            )
        shared[field] = values.pop()
    rank, alpha = (
        Counter(getattr(layer, name) for layer in layers.values()).most_common(1)[0][0]
        for name in ("r", "lora_alpha")
    )
    patterns = {_pattern(path, layer): layer for path, layer in layers.items()}
    ranks = {pattern: layer.r for pattern, layer in patterns.items()}
    alphas = {pattern: layer.lora_alpha for pattern, layer in patterns.items()}
    experts = {path: m for path, m in layers.items() if isinstance(m, LoRAExperts)}
    others = {path: layer for path, layer in layers.items() if path not in experts}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        **shared,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": ranks if len(set(ranks.values())) > 1 else {},
        "alpha_pattern": alphas if len(set(alphas.values())) > 1 else {},
        "target_modules": _target_modules(model, others),
        **(_target_parameters(model, experts) if experts else {}),
    }


def _pattern(path: str, layer: Adapted) -> str:
    """Return a key of rank_pattern: an expression of a path's end unless it begins with ^."""
    return rf"^{re.escape(path)}\.\w+" if isinstance(layer, LoRAExperts) else f"^{re.escape(path)}"


def _target_modules(model: nn.Module, layers: dict[str, Adapted]) -> list[str] | str:
    """Return the layers' paths; one regular expression where PEFT's suffix match takes more."""
    others = [path for path, _ in bare_modules(model, Adapted) if path not in layers]
    if any(other.endswith(f".{path}") for path in layers for other in others):
        return "|".join(re.escape(path) for path in layers)
    return sorted(layers)


def _target_parameters(model: nn.Module, layers: dict[str, LoRAExperts]) -> dict[str, Any]:
    """Return the fields that say which parameters of experts are adapted, and in which layout."""
    named = {"target_parameters": [join(p, n) for p, m in layers.items() for n in m.lora_A]}
    for path, module in bare_modules(model, Adapted):
        more = parameters_targeted(named, path, module) if is_experts(module) else []
        if more:
            raise ValueError(
                f"target_parameters: expected {path!r} adapted, too, since PEFT takes the end of a "
                f"path for {join(path, more[0])!r}"
            )
    return {**named, "peft_version": ".".join(map(str, ORIENTED))}


def tensors_of(model: nn.Module, layers: dict[str, Adapted], bias_mode: str) -> dict[str, Tensor]:
    """Return the values of adapter_model.safetensors; ValueError for one that isn't there."""
    parameters: dict[str, tuple[Tensor, list[int] | None]] = {}
    for path, layer in layers.items():
        shapes = shapes_of(layer, layer.r, uses_dora(layer))
        for part, size in shapes.items():
            parameters[join(path, part)] = getattr(*owner_of(layer, part)), size
        bias: Any = getattr(layer.base_layer, "bias", None)
        if bias_mode == "lora_only" and bias is not None:
            _, of_b, *_ = shapes.values()
            parameters[join(path, "base_layer.bias")] = bias, of_b[:1]
    if bias_mode == "all":
        for path, module in bare_modules(model):
            bias = own_tensor(module, "bias")
            if bias is not None:
                parameters.setdefault(join(path, "bias"), (bias, None))
    tensors = {}
    for key, (parameter, shape) in parameters.items():
        value = whole(parameter)
        if value.is_meta or (shape is not None and list(value.shape) != shape):
            where = "on the meta device" if value.is_meta else f"of shape {list(value.shape)}"
            raise ValueError(
                f"{key}: expected values{f' of shape {shape}' if shape else ''}, got a tensor "
                f"{where} (gather a sharded or offloaded model first)"
            )
        check_memory(**{key: value})
        # Cloned, since safetensors refuses tensors that share memory.
        tensors[_PREFIX + key] = value.cpu().contiguous().clone()
    return tensors


def own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """Return a module's parameter or buffer, as its state_dict has it, or None."""
    if name in module._non_persistent_buffers_set:
        return None
    parameter = module._parameters.get(name)
    return module._buffers.get(name) if parameter is None else parameter


def read_adapter(directory: Path) -> Adapter:
    """Read both files; ValueError for what can't be read or has no counterpart here."""
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
                f"{CONFIG_NAME}: {field} has no counterpart in lora_kernels, got {config[field]!r}"
            )
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGING_BASE):
        raise ValueError(
            f"{CONFIG_NAME}: expected an adapter of the unchanged base weights, got "
            f"init_lora_weights {config['init_lora_weights']!r} (PEFT's save_pretrained converts "
            "it with path_initial_model_for_weight_conversion)"
        )
    _check_patterns(config)
    return Adapter(config, *_parse(tensors, bool(config.get("use_dora"))))


def _check_patterns(config: dict[str, Any]) -> None:
    """Check the fields that choose layers: their types, and that they compile."""
    expressions = []
    parameters = config.get("target_parameters")
    if not (parameters is None or _is_list(parameters, str)):
        raise ValueError(f"{CONFIG_NAME}: target_parameters: expected strings, got {parameters!r}")
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        names = config.get(field)
        if not (names is None or isinstance(names, str) or _is_list(names, str)):
            raise ValueError(f"{CONFIG_NAME}: {field}: expected a string or strings, got {names!r}")
        if isinstance(names, str):
            expressions.append((field, names))
        elif names and field == "layers_pattern":
            expressions += [(field, name) for name in names]
    indices = config.get("layers_to_transform")
    if not (indices is None or isinstance(indices, int) or _is_list(indices, int)):
        raise ValueError(f"{CONFIG_NAME}: layers_to_transform: expected integers, got {indices!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field)
        if not (patterns is None or isinstance(patterns, dict)):
            raise ValueError(f"{CONFIG_NAME}: {field}: expected a dictionary, got {patterns!r}")
        expressions += [(field, key) for key in patterns or {}]
    for field, expression in expressions:
        try:
            re.compile(f"({expression})")
        except re.error as error:
            raise ValueError(
                f"{CONFIG_NAME}: {field}: expected a regular expression, "
                f"got {expression!r} ({error})"
            ) from error


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _parse(
    tensors: dict[str, Tensor], use_dora: bool
) -> tuple[dict[str, Weights], dict[str, Tensor]]:
    """Split a file's tensors into weights by layer path, and others by parameter path."""
    layers: dict[str, Weights] = {}
    others = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match:
            layers.setdefault(match["path"] or "", {})[match["part"]] = tensor
        elif key.startswith(_PREFIX) and key.endswith((".bias", ".base_layer.weight")):
            others[key.removeprefix(_PREFIX)] = tensor
        else:
            raise ValueError(f"{WEIGHTS_NAME}: expected lora_A and lora_B weights, got key {key!r}")
    for path in [p for p in layers if p.endswith(f".{_INNER}")]:
        outer = layers.get(path.removesuffix(f".{_INNER}"))
        if outer is not None:  # experts with two adapted parameters
            outer |= {INSIDE + part: t for part, t in layers.pop(path).items()}
    for path, found in layers.items():
        pair: tuple[str, ...] = (
            EMBEDDING_PAIR if any(part in found for part in EMBEDDING_PAIR) else PAIR
        )
        if any(part.startswith(INSIDE) for part in found):
            pair = (*PAIR, *(INSIDE + part for part in PAIR))
        expected = (*pair, MAGNITUDE) if use_dora else pair
        absent = next((part for part in expected if part not in found), None)
        if absent is not None:
            raise ValueError(f"{WEIGHTS_NAME}: expected {join(path, absent)!r}, got none")
        more = next((part for part in found if part not in expected), None)
        if more is not None:
            without = " without use_dora" if more == MAGNITUDE else f" beside {pair[0]}"
            raise ValueError(f"{WEIGHTS_NAME}: expected no {join(path, more)!r}{without}, got one")
    for path in others:
        if path.endswith(".weight") and path.removesuffix(".base_layer.weight") not in layers:
            raise ValueError(
                f"{WEIGHTS_NAME}: expected base weights of adapted layers alone, got {path!r}"
            )
    return layers, others


def check_complete(model: nn.Module, adapter: Adapter) -> None:
    """Raise ValueError for the first layer that the file should have and hasn't, or has."""
    excluded = adapter.config.get("exclude_modules") or []
    for path, module in bare_modules(model, Adapted):
        if path in adapter.layers:
            if _named(excluded, path):
                raise ValueError(
                    f"{WEIGHTS_NAME}: expected no weights of layer {path!r}, which exclude_modules "
                    f"of {CONFIG_NAME} name, got some"
                )
            continue
        if isinstance(module, Adapted):
            raise ValueError(f"{WEIGHTS_NAME}: expected weights of layer {path!r}, got none")
        if is_experts(module) and parameters_targeted(adapter.config, path, module):
            raise ValueError(
                f"{WEIGHTS_NAME}: expected weights of layer {path!r}, which target_parameters of "
                f"{CONFIG_NAME} name, got none"
            )
        if isinstance(module, _TARGETS) and targets(adapter.config, path, module, model):
            raise ValueError(
                f"{WEIGHTS_NAME}: expected weights of layer {path!r}, which target_modules of "
                f"{CONFIG_NAME} name, got none"
            )


def targets(config: dict[str, Any], path: str, module: nn.Module, model: nn.Module) -> bool:
    """Whether PEFT would adapt the module at a path, by the fields that choose layers."""
    names = config.get("target_modules")
    if not path or names is None or _named(config.get("exclude_modules") or [], path):
        return False
    if isinstance(names, str) and names.lower() == "all-linear":
        return isinstance(module, nn.Linear) and not _is_head(config, path, module, model)
    if not _named(names, path):
        return False
    indices = config.get("layers_to_transform")
    if isinstance(names, str) or path in names or indices is None or indices == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
    for expression in expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        match = re.match(expression, path)
        if match:
            index = int(match["idx"])
            return index == indices if isinstance(indices, int) else index in indices
    return False


def _named(names: list[str] | str, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path in names or any(path.endswith(f".{name}") for name in names)


def _is_head(config: dict[str, Any], path: str, module: nn.Module, model: nn.Module) -> bool:
    """Whether "all-linear" leaves a layer out, as PEFT does those of transformers' heads."""
    root = next(bare for _, bare in bare_modules(model))
    output = getattr(root, "get_output_embeddings", lambda: None)()
    if output is None:
        return config.get("task_type") == "SEQ_CLS" and path in ("score", "classifier")
    return output is module


def pattern_value(patterns: dict[str, Any] | None, paths: list[str], default: Any) -> Any:
    """Return the first pattern's value that matches a path as PEFT matches it, else default.

    Raises:
        ValueError: paths, of the parameters of one layer, have several.
    """
    values = set()
    for path in paths:
        matching = (v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path))
        values.add(next(matching, default))
    if len(values) > 1:
        raise ValueError(f"{CONFIG_NAME}: expected one value for {', '.join(paths)}, got {values}")
    return values.pop()

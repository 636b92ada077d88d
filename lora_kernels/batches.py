"""Training and inference on batches whose samples belong to different adapters of a PEFT model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

_BATCH = "_lora_kernels_batch"


class Batch:
    """What the layers of a model are told inside `adapter_batch`."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # A model that is copied or pickled inside a block is outside of any.
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    def forward(self, layer: Any, x: Tensor, impl: str, path: str) -> Tensor:
        """Return a layer's output for the batch.

        Raises:
            TypeError, ValueError: x has another number of samples, or the layer can't serve the
                call.
        """
        from lora_kernels._peft import mixed

        names = self.samples.names
        if not isinstance(x, Tensor) or not x.ndim:
            got = "a 0-dimensional one" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a Tensor of {len(names)} samples, got {got}")
        if len(x) != len(names):
            raise ValueError(
                f"names: expected one of each of {len(x)} samples of x, got {len(names)}"
            )
        if layer.disable_adapters and layer.merged:
            layer.unmerge()  # as PEFT's forward does
        if layer.disable_adapters or not (layer.merged or mixed.adapters_of(layer, names)):
            return cast(Tensor, layer.base_layer(x))
        y = mixed.forward(layer, x, self.samples, impl, path)
        if isinstance(y, str):
            raise ValueError(f"layer {path!r}: expected one that serves adapter_batch, got: {y}")
        vars(layer)["_lora_kernels_calls"].fused += 1
        return y


@contextmanager
def adapter_batch(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let each sample of a batch have an adapter of its own, in training too::

        y[i] = x[i] Wᵀ + bias + s · D(x[i]) Aᵀ Bᵀ      with s, A and B of adapter names[i]

    Calls of the model inside the block compute so, one fused call a layer, and gradients go to all
    adapters named, as those of separate runs do; PEFT's own `adapter_names` serves inference alone.
    Backward belongs inside too, where activations are checkpointed. Which adapters get gradients is
    decided by their parameters: PEFT freezes those of adapters that aren't active
    (`requires_grad_` changes it).

    Args:
        model: a PEFT model that `patch_peft` patched, whose layers are LoRA linear layers.
        names: of each sample, an adapter of the model, or "__base__" for none.

    Returns:
        A context manager.

    Raises:
        TypeError: `model` is no module, `names` is no sequence, or a name is no string.
        ValueError: an unknown adapter, a layer that can't serve it (named with the reason), a
            module that one adapter has for all samples, as `modules_to_save` makes, or a block
            inside another one; nothing is changed then. Inside: a layer is called with another
            number of samples, or with `adapter_names`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
        >>> model.add_adapter("other", config)
        >>> found = lk.patch_peft(model)
        >>> with lk.adapter_batch(model, ["default", "other", "__base__"]):
        ...     y = model(torch.ones(3, 8))
        >>> y.shape, bool((y[0] == y[1]).all())
        (torch.Size([3, 8]), False)
    """
    if isinstance(names, str):
        raise TypeError(f"names: expected a name for each sample, got one string, {names!r}")
    if not isinstance(names, Sequence):  # a set has no order, an iterator is read once
        raise TypeError(f"names: expected a sequence of strings, got {type(names).__name__}")
    layers = _layers(model, tuple(names))
    from lora_kernels._peft.mixed import Samples  # where there are such layers, there is peft

    batch = Batch(Samples(names))
    for layer in layers:
        vars(layer)[_BATCH] = batch
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop(_BATCH, None)


def _layers(model: nn.Module, names: tuple[str, ...]) -> list[Any]:
    """Return the LoRA layers of a model, which serve a batch of such adapters."""
    from lora_kernels._peft import mixed
    from lora_kernels.patching import lora_layers

    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"names: expected strings, got {wrong[0]!r}")
    found = lora_layers(model)
    if not found:
        raise ValueError(f"model: expected PEFT LoRA layers, got none in {type(model).__name__}")
    known = {name for _, layer in found for name in mixed.adapters_of(layer, None)}
    unknown = sorted(set(names) - known - {mixed.BASE})
    if unknown:
        raise ValueError(
            f"names: expected adapters of the model, {', '.join(sorted(known))}, or "
            f"{mixed.BASE}, got {', '.join(unknown)}"
        )
    for path, layer in found:
        reason = _refusal(layer, names)
        if reason is not None:
            raise ValueError(
                f"model: expected layers that serve several adapters, got {path!r}: {reason}"
            )
    _check_others(model, names)
    return [layer for _, layer in found if _is_served(layer)]


def _is_served(layer: Any) -> bool:
    from lora_kernels._peft.linear import FusedLinear

    return isinstance(layer, FusedLinear) and "_lora_kernels_impl" in vars(layer)


def _refusal(layer: Any, names: tuple[str, ...]) -> str | None:
    """Return why a LoRA layer can't compute such a batch, or None."""
    from lora_kernels._peft import mixed

    named = mixed.adapters_of(layer, names)
    if not _is_served(layer):
        # Outside of the batch: what is active in it would be applied to all samples.
        active = () if layer.disable_adapters else layer.active_adapters
        applied = named or layer.merged_adapters or mixed.adapters_of(layer, active)
        return f"is {type(layer).__name__}, no patched linear layer" if applied else None
    if vars(layer).get(_BATCH) is not None:
        return "is in an adapter_batch already"
    if not named:
        merged = () if layer.disable_adapters else layer.merged_adapters
        return f"merged: {', '.join(merged)}" if merged else None
    parts = mixed.mixed_parts(layer, names)
    return parts if isinstance(parts, str) else None


def _check_others(model: nn.Module, names: tuple[str, ...]) -> None:
    """Check that what else PEFT put into a model, once for all samples, is what each would have."""
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        if isinstance(module, LoraLayer):
            continue
        owned: set[str] = module._get_available_adapters()
        active = set() if module.disable_adapters else owned & {*module.active_adapters}
        if any(owned & {name} != active for name in names):
            raise ValueError(
                f"model: expected layers that serve several adapters, got {path!r}: "
                f"{type(module).__name__}, which has one adapter for all samples, now "
                f"{', '.join(sorted(active)) or 'none'}"
            )

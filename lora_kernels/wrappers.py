"""Models as trainers have them: modules without their wrappers, tensors without their shards."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor, nn

from lora_kernels.checks import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# A wrapper's class, by the module that offers it, and the attribute of what it wraps. Looked up
# where loaded: a module that isn't has no instances.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    ("deepspeed", "DeepSpeedEngine", "module"),
)
# What reduces the gradients of the parameters that it saw when it was made, and of no others.
_REDUCERS = (
    ("torch.nn.parallel", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("torch.distributed.fsdp", "FSDPModule"),
    ("deepspeed", "DeepSpeedEngine"),
)


class Place(NamedTuple):
    """A module without wrappers, what holds it under which name, and all that lies around it."""

    module: nn.Module
    owner: nn.Module | None
    name: str
    around: tuple[nn.Module, ...]


def loaded(module: str, name: str) -> Any:
    """Return a class of a module, for isinstance; nothing is one of a module not imported."""
    return getattr(sys.modules.get(module), name, ())


def bare_modules(model: nn.Module, stop: type | tuple[()] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules and paths as named_modules does, but as if nothing were wrapped.

    Nothing inside an instance of `stop` is yielded.
    """
    yield from _bare_modules(model, "", stop, set())


def _bare_modules(
    module: nn.Module, path: str, stop: type | tuple[()], seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    inner = _inner_name(module)
    if inner is None:
        yield path, module
    if isinstance(module, stop):
        return
    for name, child in module._modules.items():
        if child is not None:
            child_path = path if name == inner else f"{path}.{name}" if path else name
            yield from _bare_modules(child, child_path, stop, seen)


def find(model: nn.Module, path: str) -> Place | None:
    """Return the module at a path of `bare_modules`, or None."""
    place = _unwrapped(Place(model, None, "", ()))
    for name in path.split(".") if path else ():
        child = place.module._modules.get(name)
        if child is None:
            return None
        place = _unwrapped(Place(child, place.module, name, (*place.around, place.module)))
    return place


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what a module's wrappers hold, if it has any."""
    return _unwrapped(Place(module, None, "", ())).module


def replace(place: Place, module: nn.Module) -> None:
    """Put a module in the place of another; what wraps that one then wraps the new one."""
    assert place.owner is not None
    setattr(place.owner, place.name, module)
    if isinstance(place.owner, loaded("torch._dynamo.eval_frame", "OptimizedModule")):
        # Its forward calls the module that it was made with, until it is made anew.
        place.owner.__setstate__(place.owner.__getstate__())


def reducer_around(place: Place) -> str | None:
    """Return the class of what wouldn't reduce gradients of new parameters at a place, or None."""
    for module in (*place.around, place.module):
        for kind in _REDUCERS:
            if isinstance(module, loaded(*kind)):
                return kind[1]
    return None


@contextmanager
def gathered(model: nn.Module, *, write: bool) -> Iterator[None]:
    """Have FSDP's parameters as they are kept: whole (FSDP1), or whole by `whole` (FSDP2).

    All ranks take part. With `write`, what is written to the parameters stays.
    """
    fsdp = loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    for module in model.modules():
        if isinstance(module, loaded("torch.distributed.fsdp", "FSDPModule")):
            module.reshard()  # what a forward left gathered is a copy, of its compute dtype
    units = [module for module in model.modules() if isinstance(module, fsdp)]
    if all(unit.training_state.name == "SUMMON_FULL_PARAMS" for unit in units):
        yield
        return
    with fsdp.summon_full_params(model, writeback=write):
        yield


def whole(t: Tensor) -> Tensor:
    """Return the value of a parameter that may be a DTensor or ZeRO-3's; all ranks take part."""
    if is_dtensor(t) and not t.is_meta:
        shards = cast(Any, t.detach())
        # CPU offload keeps shards where the mesh's devices can't exchange them.
        return shards.to(shards.device_mesh.device_type).full_tensor()
    if hasattr(t, "ds_id") and t.numel() == 0:
        from deepspeed import zero

        with zero.GatheredParameters(t):
            return t.detach().clone()
    return t.detach()


def share(value: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's share of a value, as the parameter is sharded."""
    if not is_dtensor(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    like = cast("DTensor", parameter)
    # Each rank has read the file: nothing is sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _inner_name(module: nn.Module) -> str | None:
    for offered_by, name, attribute in _WRAPPERS:
        if isinstance(module, loaded(offered_by, name)):
            return attribute
    return None


def _unwrapped(place: Place) -> Place:
    while (name := _inner_name(place.module)) is not None:
        wrapper = place.module
        place = Place(getattr(wrapper, name), wrapper, name, (*place.around, wrapper))
    return place

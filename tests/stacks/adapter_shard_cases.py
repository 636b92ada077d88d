"""What each of two processes does in test_adapter_shards: files are those of the whole model."""

import copy
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from lora_kernels.tensor_parallel import ColwiseLoRA, RowwiseLoRA
from tests.support.adapters import Net, adapt, listing
from tests.support.closeness import assert_close

SETTINGS = {"q": {"r": 3}, "z.q": {"lora_alpha": 2}, "z.k": {}}


def folder():
    """Return a new directory, the same one on every rank."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return Path(made[0])


def adapted(**shared):
    """Return a whole model; ranks have one seed and so the same one."""
    return adapt(Net(), SETTINGS, **{"bias": "all", **shared})


def mesh(*shape):
    shape = shape or (dist.get_world_size(),)
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor")[: len(shape)])


def saved(model, directory):
    """Let all ranks save to one directory; return its files."""
    lk.save_adapter(model, directory)
    dist.barrier()
    return listing(directory)


def files_go_both_ways(shard, forward=True, tolerance=1e-5):
    """A sharded model saves and loads what the whole one does, before and after a forward."""
    at, first, second = folder(), adapted(), adapted()
    second.load_state_dict(first.state_dict(), strict=False)
    for layer in map(second.get_submodule, SETTINGS):
        nn.init.normal_(layer.lora_A.weight)
        nn.init.normal_(layer.lora_B.weight)
        if layer.base_layer.bias is not None:
            nn.init.normal_(layer.base_layer.bias)
    files = {name: saved(m, at / name) for name, m in (("first", first), ("second", second))}
    model, x = shard(copy.deepcopy(first)), torch.randn(5, 8)
    assert saved(model, at / "sharded") == files["first"]
    if forward:
        with torch.no_grad():
            model(x)  # FSDP leaves the root's parameters gathered
        assert saved(model, at / "used") == files["first"]
    lk.load_adapter(model, at / "second")
    assert saved(model, at / "loaded") == files["second"]
    if forward:
        model(x).sum().backward()
        assert_close(model(x).float(), second(x), tolerance)
        assert saved(model, at / "trained") == files["second"]


def fsdp2(model, **settings):
    for block in (model.q, model.z, model.zok):
        fully_shard(block, mesh=mesh(), **settings)
    return fully_shard(model, mesh=mesh(), **settings)


def fsdp2_of_low_precision(model):
    return fully_shard(model, mesh=mesh(), mp_policy=MixedPrecisionPolicy(torch.bfloat16))


def fsdp2_and_more(model):
    model.z.q = checkpoint_wrapper(model.z.q)
    return torch.compile(fsdp2(model), backend="eager")


def fsdp1(model, orig, policy=None, **settings):
    if not orig:
        model.requires_grad_(True)  # one flat parameter holds all
    return FullyShardedDataParallel(
        model,
        use_orig_params=orig,
        auto_wrap_policy=policy,
        device_id=torch.device("cpu"),
        **settings,
    )


def fsdp1_of_low_precision(model):
    precision = MixedPrecision(torch.bfloat16, cast_root_forward_inputs=True)
    strategy = ShardingStrategy.SHARD_GRAD_OP  # keeps what a forward gathered
    return fsdp1(model, True, sharding_strategy=strategy, mixed_precision=precision)


def fsdp1_summoned_by_its_owner():
    at, bare = folder(), adapted()
    expected = saved(bare, at / "bare")
    model = fsdp1(copy.deepcopy(bare), True)
    with FullyShardedDataParallel.summon_full_params(model):
        assert saved(model, at / "sharded") == expected
        lk.load_adapter(model, at / "bare")


def tensor_parallel(model, along=None):
    """Columns and rows of 12, 8 and 8 features; of 3 ranks in q, an uneven split."""
    layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    styles = {"q": ColwiseLoRA(**layouts), "z.q": RowwiseLoRA(**layouts)}
    styles["z.k"] = ColwiseLoRA(**layouts)
    return parallelize_module(model, along or mesh(), styles)


def fsdp_and_tp(model, shape):
    both = mesh(*shape)
    return fully_shard(tensor_parallel(model, both["tensor"]), mesh=both["data"])


def uneven(style):
    """17 in and 13 out features on two ranks."""
    at, layer = folder(), lk.LoRALinear(17, 13, r=3, bias="lora_only")
    model = nn.Sequential(layer)
    nn.init.normal_(layer.lora_B.weight)
    expected = saved(model, at / "bare")
    other = nn.Sequential(lk.LoRALinear(17, 13, r=3, bias="lora_only"))
    split = parallelize_module(other, mesh(), {"0": style()})
    lk.load_adapter(split, at / "bare")
    assert isinstance(split[0].lora_A.weight, DTensor)
    assert saved(split, at / "split") == expected


def plain_linears_are_refused(shard):
    """An adapter made inside would be trained apart on each rank."""
    at = folder()
    saved(adapted(), at)
    model = shard(Net())
    names = [(name, type(m)) for name, m in model.named_modules()]
    with pytest.raises(ValueError, match=r"'q' to be a LoRALinear inside .* \(load before"):
        lk.load_adapter(model, at)
    assert [(name, type(m)) for name, m in model.named_modules()] == names


def bias_modes_are_kept():
    at = folder()
    saved(adapted(), at)
    with pytest.raises(ValueError, match=r"q: expected bias 'none' inside DistributedData.*'all'"):
        lk.load_adapter(DistributedDataParallel(adapted(bias="none")), at)


def shards_on_meta_are_refused():
    at = folder()
    saved(adapted(), at)
    with torch.device("meta"):
        model = fsdp2(adapted())
    with pytest.raises(ValueError, match=r"q.lora_A: expected values, got shards on the meta"):
        lk.load_adapter(model, at)
    with pytest.raises(ValueError, match=r"q.lora_A.weight: expected values .* on the meta"):
        lk.save_adapter(model, at)


WRAP = ModuleWrapPolicy({lk.LoRALinear})
CASES = {
    "DDP": lambda: files_go_both_ways(DistributedDataParallel),
    "DDP, compiled": lambda: files_go_both_ways(
        lambda m: torch.compile(DistributedDataParallel(m), backend="eager")
    ),
    "FSDP2": lambda: files_go_both_ways(fsdp2),
    "FSDP2, layers": lambda: files_go_both_ways(
        lambda m: (fully_shard(m.z.q, mesh=mesh()), fully_shard(m, mesh=mesh()))[1], forward=False
    ),
    "FSDP2, mixed precision": lambda: files_go_both_ways(fsdp2_of_low_precision, tolerance=0.05),
    "FSDP2, CPU offload": lambda: files_go_both_ways(
        lambda m: fsdp2(m, offload_policy=CPUOffloadPolicy(pin_memory=False))
    ),
    "FSDP2, checkpointed, compiled": lambda: files_go_both_ways(fsdp2_and_more),
    "FSDP1": lambda: files_go_both_ways(lambda m: fsdp1(m, True)),
    "FSDP1, units": lambda: files_go_both_ways(lambda m: fsdp1(m, True, WRAP)),
    "FSDP1, flat": lambda: files_go_both_ways(lambda m: fsdp1(m, False)),
    "FSDP1, mixed precision": lambda: files_go_both_ways(fsdp1_of_low_precision, tolerance=0.05),
    "FSDP1, summoned": fsdp1_summoned_by_its_owner,
    "tensor parallel": lambda: files_go_both_ways(tensor_parallel),
    "tensor parallel, columns, uneven": lambda: uneven(ColwiseLoRA),
    "tensor parallel, rows, uneven": lambda: uneven(RowwiseLoRA),
    "FSDP2 of two, tensor parallel of one": lambda: files_go_both_ways(
        partial(fsdp_and_tp, shape=(2, 1)), forward=False
    ),
    "FSDP2 of one, tensor parallel of two": lambda: files_go_both_ways(
        partial(fsdp_and_tp, shape=(1, 2)), forward=False
    ),
    "nn.Linear in DDP": lambda: plain_linears_are_refused(DistributedDataParallel),
    "nn.Linear in FSDP1": lambda: plain_linears_are_refused(lambda m: fsdp1(m, True)),
    "nn.Linear in FSDP2": lambda: plain_linears_are_refused(fsdp2),
    "bias modes in DDP": bias_modes_are_kept,
    "FSDP2 on meta": shards_on_meta_are_refused,
}

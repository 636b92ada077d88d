"""What each of two processes does in test_experts: Qwen3-MoE's adapters, replicated and sharded."""

import copy

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from tests.stacks.distributed_cases import assert_gradients_of_one_process, local_rows, loss_of
from tests.stacks.models import adapted_qwen3_moe, tokens


def _pair():
    plain = adapted_qwen3_moe()
    model = copy.deepcopy(plain)
    assert not lk.patch_peft(model).left
    return model, plain


def _assert_fused(model):
    used = lk.report(model).layers
    outer = {path: use for path, use in used.items() if path.endswith("experts")}
    assert outer
    assert all(use.fused == 1 and not use.left for use in outer.values()), outer


def ddp():
    model, plain = _pair()
    rows = tokens(4)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    loss_of(wrapped, local_rows(rows)).backward()
    _assert_fused(model)
    assert_gradients_of_one_process(wrapped, plain, rows)


def fsdp2():
    model, plain = _pair()
    rows = tokens(4)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    loss_of(model, local_rows(rows)).backward()
    _assert_fused(model)
    assert_gradients_of_one_process(model, plain, rows)
    assert dist.get_world_size() == 2


CASES = {"ddp": ddp, "fsdp2": fsdp2}

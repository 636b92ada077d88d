"""What each of two processes does in test_deepspeed: ZeRO-1 to ZeRO-3 on the CPU."""

import copy
import tempfile
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

import lora_kernels as lk
from tests.stacks.models import FusedCalls, adapted_llama, tokens
from tests.support.adapters import Net, adapt, listing
from tests.support.closeness import assert_close

LAYERS = 14
# Else each process compiles a collective of DeepSpeed's own, for a minute and a half.
deepspeed.comm.torch.build_shm_op = lambda: None


def engine_of(model, stage):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def zero(stage, leaves=False, fused_calls=LAYERS):
    plain, rows = adapted_llama(), tokens(4)
    model = copy.deepcopy(plain)
    lk.patch_peft(model)
    if leaves:
        # DeepSpeed takes a leaf module's gradients when its input's is there: it needs to have one.
        model.enable_input_require_grads()
        deepspeed.utils.set_z3_leaf_modules(model, ["FusedLinear"])
    engine = engine_of(model, stage)
    mine = rows.chunk(dist.get_world_size())[dist.get_rank()]
    with FusedCalls() as fused:
        loss = engine(input_ids=mine, labels=mine).loss
    assert fused.count == fused_calls, fused.count
    engine.backward(loss)
    plain(input_ids=rows, labels=rows).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            assert_close(safe_get_full_grad(parameter), expected[name], 1e-4, name)
    if fused_calls == 0:
        assert len(set(lk.patch_peft(model).left.values())) == 1


def adapter_files(stage):
    """A file is the whole model's; loading is refused, since the engine has copies of its own."""
    folders = [Path(tempfile.mkdtemp()) for _ in range(2)]
    bare = adapt(Net(), {"q": {"r": 3}, "z.q": {}, "zok": {}}, bias="all")
    model = copy.deepcopy(bare)
    engine = engine_of(model, stage)
    lk.save_adapter(bare, folders[0])
    lk.save_adapter(engine, folders[1])
    assert listing(folders[1]) == listing(folders[0])
    if stage == 3:
        assert model.q.lora_A.weight.numel() == 0  # and sharded again
    for target in (engine, model):
        with pytest.raises(ValueError, match=r"load_adapter before deepspeed\.initialize"):
            lk.load_adapter(target, folders[0])


CASES = {
    "ZeRO-1": lambda: zero(1),
    "ZeRO-2": lambda: zero(2),
    "ZeRO-3, PEFT's forward": lambda: zero(3, fused_calls=0),
    "ZeRO-3, leaf modules": lambda: zero(3, leaves=True),
    "ZeRO-1, adapter files": lambda: adapter_files(1),
    "ZeRO-3, adapter files": lambda: adapter_files(3),
}

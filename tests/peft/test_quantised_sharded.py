"""Quantised layers in DDP, FSDP2 and tensor parallelism, each of one process."""

import pytest
import torch

import lora_kernels as lk
from tests.support.quantised import adapted, results

pytest.importorskip("bitsandbytes")
X = torch.linspace(-2, 2, 6 * 56).reshape(2, 3, 56)


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_tensor_parallel_styles_refuse_codes(one_process):
    from torch.distributed.tensor.parallel import parallelize_module

    from lora_kernels.tensor_parallel import ColwiseLoRA, RowwiseLoRA

    layer = adapted("nf4").base_model.model.a
    before = layer.base_layer.weight
    for style in (ColwiseLoRA, RowwiseLoRA):
        with pytest.raises(TypeError, match="expected a plain float weight to split"):
            parallelize_module(layer, one_process, style())
    assert layer.base_layer.weight is before


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_ddp_and_fsdp2_of_one_process(storage, one_process):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    wanted = results(adapted("nf4", patched=False), X)
    sharded = adapted("nf4", storage=storage)
    for layer in (sharded.base_model.model.a, sharded.base_model.model.b, sharded):
        fully_shard(layer, mesh=one_process)
    for model in (DistributedDataParallel(adapted("nf4", storage=storage)), sharded):
        for ours, theirs in zip(results(model, X), wanted, strict=True):
            whole = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
            torch.testing.assert_close(whole, theirs)
    uses = lk.report(sharded).layers.values()
    assert all((use.fused, use.left) == (1, 0) for use in uses)

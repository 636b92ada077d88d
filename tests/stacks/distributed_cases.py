"""What each of two processes does in test_distributed: gradients must be those of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from lora_kernels.tensor_parallel import ColwiseLoRA, RowwiseLoRA
from tests.stacks.models import (
    FusedCalls,
    adapted_llama,
    assert_close,
    gradients,
    patched_copy,
    tokens,
)

LAYERS = 14
COLWISE = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
ROWWISE = ["self_attn.o_proj", "mlp.down_proj"]


def loss_of(model, rows):
    return model(input_ids=rows, labels=rows).loss


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def local_rows(rows):
    return rows.chunk(dist.get_world_size())[dist.get_rank()]


def assert_gradients_of_one_process(model, plain, rows):
    """Compare with the gradients of an unpatched model that sees all rows."""
    loss_of(plain, rows).backward()
    ours = {name.replace("module.", ""): whole(grad) for name, grad in gradients(model).items()}
    for name, grad in gradients(plain).items():
        assert_close(ours[name], grad, 1e-4, name)


def ddp():
    plain, rows = adapted_llama(), tokens(4)
    model = DistributedDataParallel(patched_copy(plain))
    with FusedCalls() as fused:
        loss_of(model, local_rows(rows)).backward()
    assert fused.count == LAYERS
    assert_gradients_of_one_process(model, plain, rows)


def ddp_accumulation():
    """Two micro-batches, the first without synchronisation, under checkpointing and dropout 0."""
    plain, rows = adapted_llama(), tokens(8)
    model = patched_copy(plain)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = DistributedDataParallel(model)
    first, second = local_rows(rows).chunk(2)
    with model.no_sync():
        (loss_of(model, first) / 2).backward()
    (loss_of(model, second) / 2).backward()
    assert_gradients_of_one_process(model, plain, rows)


def sharded(model, mesh=None, **settings):
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def fsdp(adapters="sharded", patch="before", **settings):
    plain, rows = adapted_llama(), tokens(4)
    model = copy.deepcopy(plain)
    replicated = [p for p in model.parameters() if p.requires_grad and adapters == "replicated"]
    if patch == "before":
        lk.patch_peft(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded(model, mesh, ignored_params=set(replicated), **settings)
    if patch == "after":
        assert len(lk.patch_peft(model).patched) == LAYERS
    with FusedCalls() as fused:
        loss_of(model, local_rows(rows)).backward()
    assert fused.count == LAYERS
    base = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert base.to_local().numel() == base.numel() // 2
    for parameter in replicated:  # what DDP would do
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    assert_gradients_of_one_process(model, plain, rows)


def fsdp_of_bfloat16():
    """Against float32 in one process a patched model errs at most twice as much as PEFT's own."""
    plain, rows = adapted_llama(), tokens(4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    models = {"peft": copy.deepcopy(plain), "ours": copy.deepcopy(plain)}
    lk.patch_peft(models["ours"])
    loss_of(plain, rows).backward()
    errors = {}
    for name, model in models.items():
        sharded(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        with FusedCalls() as fused:
            loss_of(model, local_rows(rows)).backward()
        assert fused.count == (LAYERS if name == "ours" else 0)
        found = gradients(model)
        errors[name] = max(
            ((whole(found[key]) - grad).abs().max() / grad.abs().max()).item()
            for key, grad in gradients(plain).items()
        )
    assert errors["ours"] <= 2 * errors["peft"], errors


def fsdp1():
    """Its parameters are plain views of a flat one while a layer runs."""
    plain, rows = adapted_llama(), tokens(4)
    model = FullyShardedDataParallel(
        patched_copy(plain), use_orig_params=True, device_id=torch.device("cpu")
    )
    with FusedCalls() as fused:
        loss_of(model, local_rows(rows)).backward()
    assert fused.count == LAYERS
    loss_of(plain, rows).backward()
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        ours = {k.removeprefix("_fsdp_wrapped_module."): g for k, g in gradients(model).items()}
    for name, grad in gradients(plain).items():
        assert_close(ours[name], grad, 1e-4, name)


def collectives_result():
    """An x that its first reader waits for."""
    layer = adapted_llama().base_model.model.model.layers[0].mlp.up_proj
    ours, x = patched_copy(layer), torch.randn(3, layer.in_features)
    with FusedCalls() as fused:
        y = ours(all_reduce(x, "sum", dist.group.WORLD))
    assert fused.count == 1
    dist.all_reduce(x)
    assert_close(y, layer(x), 1e-5, "y")


def tensor_parallel(model, mesh):
    styles = {name: ColwiseLoRA() for name in COLWISE} | {name: RowwiseLoRA() for name in ROWWISE}
    for layer in model.base_model.model.model.layers:
        parallelize_module(layer, mesh, styles)
    return model


def tp(**config):
    """Every rank sees all rows and has its part of every layer; W is not gathered."""
    plain, rows = adapted_llama(**config), tokens(4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = tensor_parallel(patched_copy(plain), mesh)
    assert set(lk.prepack_(model).left.values()) == {"the weight is a DTensor"}
    weight = model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight
    assert weight.to_local().shape == (64, 48)
    with FusedCalls() as fused, CommDebugMode() as communication:
        loss_of(model, rows).backward()
    assert fused.count == LAYERS
    moved = {str(op): count for op, count in communication.get_comm_counts().items()}
    assert not any("gather" in op for op in moved), moved
    assert_gradients_of_one_process(model, plain, rows)


def tp_of_uneven_sizes(style, dropout_p=0.0):
    """17 in and 13 out features on two ranks, a base bias, and x with three dimensions."""
    layer = lk.LoRALinear(17, 13, r=3, lora_dropout=dropout_p, bias="all")
    torch.nn.init.normal_(layer.lora_B.weight)
    alone, x = copy.deepcopy(layer), torch.randn(2, 5, 17)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    layer = parallelize_module(layer, mesh, style(**layouts))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    results = []
    for m, leaf in ((layer, ours), (alone, theirs)):
        torch.manual_seed(3)
        y = m(leaf)
        y.square().sum().backward()
        results.append(y)
    assert_close(*results)
    assert_close(ours.grad, theirs.grad)
    for parameter, expected in zip(layer.parameters(), alone.parameters(), strict=True):
        if parameter.requires_grad:
            assert not any(p.is_partial() for p in parameter.grad.placements)
            assert_close(parameter.grad.full_tensor(), expected.grad)


def merging_of_shards(style):
    """A sharded weight is merged into and comes back, also where one rank's part alone changed."""
    layer = lk.LoRALinear(17, 13, r=3)
    torch.nn.init.normal_(layer.lora_B.weight)
    x, before = torch.randn(2, 5, 17), layer.base_layer.weight.detach().clone()
    expected = layer(x)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    layer = parallelize_module(layer, mesh, style(**layouts))
    weight = layer.base_layer.weight
    layer.merge()
    assert layer.base_layer.weight is weight
    assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(weight.full_tensor(), before)
    layer.merge()
    weight.to_local().add_(dist.get_rank())
    layer.unmerge()
    changes = (weight.full_tensor() - before).round(decimals=4).unique()
    assert changes.tolist() == [0.0, 1.0]


def tp_dropout_of_split_columns():
    """Row-wise, each rank draws the mask of its own columns of x, another than its neighbour."""
    layer = lk.LoRALinear(64, 64, r=64, lora_alpha=64, lora_dropout=0.25, base_bias=False)
    for weight in (layer.lora_A.weight, layer.lora_B.weight):
        torch.nn.init.eye_(weight)
    torch.nn.init.zeros_(layer.base_layer.weight)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(layer, mesh, RowwiseLoRA(input_layouts=Replicate()))
    kept = layer(torch.ones(400, 64)) != 0  # D(x)
    left, right = kept.chunk(2, dim=-1)
    assert not torch.equal(left, right)
    # 25,600 elements at 6 standard errors, and as many pairs that are independent of each other.
    assert abs(kept.float().mean().item() - 0.75) < 0.017
    assert abs((left & right).float().mean().item() - 0.75**2) < 0.027


def batch_of_dtensors():
    """x split along its first dimension, everything else on every rank: data parallelism."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = [torch.randn(*shape) for shape in ((6, 5, 16), (12, 16), (3, 16), (12, 3), (12,))]
    placements = [[Shard(0)], *[[Replicate()]] * 4]
    leaves = [t.clone().requires_grad_() for t in tensors]
    split = [
        distribute_tensor(t, mesh, p).requires_grad_()
        for t, p in zip(tensors, placements, strict=True)
    ]
    lk.lora_linear(*leaves, scaling=torch.tensor(1.5)).square().sum().backward()
    y = lk.lora_linear(*split, scaling=torch.tensor(1.5))
    assert y.placements == (Shard(0),)
    with CommDebugMode() as communication:
        y.square().sum().backward()
    for ours, theirs in zip(split, leaves, strict=True):
        assert not any(p.is_partial() for p in ours.grad.placements)
        assert_close(ours.grad.full_tensor(), theirs.grad)
    # W (trained here too), A, B and the bias: one sum each, and nothing of x or y moves.
    assert communication.get_total_counts() == 4, communication.get_comm_counts()


def mixed_tensors_are_named():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, w = distribute_tensor(torch.randn(4, 8), mesh, [Replicate()]), torch.randn(6, 8)
    with pytest.raises(TypeError, match="weight: expected a DTensor as x is one, got a Tensor"):
        lk.lora_linear(x, w, torch.randn(2, 8), torch.randn(6, 2))


def fsdp_and_tp(shape):
    """A mesh of two dimensions, one of them of size one: two processes are all there are."""
    plain, rows = adapted_llama(), tokens(4)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    model = tensor_parallel(patched_copy(plain), mesh["tensor"])
    sharded(model, mesh["data"])
    mine = rows.chunk(shape[0])[mesh.get_local_rank("data")]
    with FusedCalls() as fused:
        loss_of(model, mine).backward()
    assert fused.count == LAYERS
    assert_gradients_of_one_process(model, plain, rows)


def training():
    """Ten AdamW steps with clipping by tensor parallelism follow those of one process."""
    rows, curves = tokens(4), []
    plain = adapted_llama()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split = tensor_parallel(patched_copy(plain), mesh)
    for model, mine in ((plain, rows), (split, rows)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(10):
            loss = loss_of(model, mine)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.98 * curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=0)


def tp_by_inner_modules():
    """torch's own styles hook the layer's inner modules: PEFT's forward runs, and is right."""
    plain, rows = adapted_llama(), tokens(4)
    model, styles = patched_copy(plain), {}
    for name in COLWISE:
        styles |= {f"{name}.base_layer": ColwiseParallel()}
        styles |= {f"{name}.lora_B.default": ColwiseParallel()}
    for name in ROWWISE:
        styles |= {f"{name}.base_layer": RowwiseParallel()}
        styles |= {f"{name}.lora_A.default": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        parallelize_module(layer, mesh, styles)
    assert set(lk.patch_peft(model).left.values()) == {"base layer has hooks"}
    with FusedCalls() as fused:
        loss_of(model, rows).backward()
    assert fused.count == 0
    assert_gradients_of_one_process(model, plain, rows)


CASES = {
    "DDP": ddp,
    "DDP, accumulation, checkpointing": ddp_accumulation,
    "FSDP2": fsdp,
    "FSDP2, patched after sharding": lambda: fsdp(patch="after"),
    "FSDP2, adapters replicated": lambda: fsdp(adapters="replicated"),
    "FSDP2, mixed precision": fsdp_of_bfloat16,
    "FSDP2, CPU offload": lambda: fsdp(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "FSDP1": fsdp1,
    "input of a collective": collectives_result,
    "tensor parallel": tp,
    "tensor parallel, biases": lambda: tp(lora_bias=True, bias="lora_only"),
    "tensor parallel, columns, uneven": lambda: tp_of_uneven_sizes(ColwiseLoRA, dropout_p=0.3),
    "tensor parallel, rows, uneven": lambda: tp_of_uneven_sizes(RowwiseLoRA),
    "merging, columns": lambda: merging_of_shards(ColwiseLoRA),
    "merging, rows": lambda: merging_of_shards(RowwiseLoRA),
    "tensor parallel, dropout of rows": tp_dropout_of_split_columns,
    "tensor parallel, training": training,
    "tensor parallel, torch's styles": tp_by_inner_modules,
    "batch split as a DTensor": batch_of_dtensors,
    "DTensors and tensors mixed": mixed_tensors_are_named,
    "FSDP2 of two, tensor parallel of one": lambda: fsdp_and_tp((2, 1)),
    "FSDP2 of one, tensor parallel of two": lambda: fsdp_and_tp((1, 2)),
}

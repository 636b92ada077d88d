"""PEFT's LoRA of experts, patched: against the same model unpatched, and what is left to PEFT."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lora_kernels as lk

peft = pytest.importorskip("peft")

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "qk_nope_head_dim": 8, **ROUTED,
}  # fmt: skip
# Gated, with biases and interleaved (gpt-oss), without a gate (Nemotron-H).
FAMILIES = {
    "Qwen3Moe": {"num_experts": 8, "head_dim": 8, **ROUTED},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
    },
    "DeepseekV3": DEEPSEEK,
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "NemotronH": {
        "head_dim": 8, "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 16,
        "n_group": 1, "topk_group": 1, "hybrid_override_pattern": "*E", "mamba_num_heads": 4,
        "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8, **ROUTED,
    },
}  # fmt: skip


def causal(family, targets=("gate_up_proj", "up_proj", "down_proj"), **lora):
    config = getattr(transformers, f"{family}Config")(**SMALL | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names = {name for name, p in model.named_parameters() if p.ndim == 3}
    found = sorted({".".join(n.split(".")[-2:]) for n in names if n.split(".")[-1] in targets})
    given = {"r": 4, "lora_alpha": 8, "init_lora_weights": False} | lora
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=found, **given)
    return peft.get_peft_model(model, config)


def step(model, ids):
    """Return the loss and all adapters' gradients."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), {
        n: torch.zeros(()) if g is None else g.clone() for n, g in trained.items()
    }


def assert_same_step(model, plain, tolerance=1e-4):
    ids = torch.randint(0, 64, (2, 13))
    (loss, grads), (expected, others) = step(model, ids), step(plain, ids)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        scale = others[name].abs().max().item()
        torch.testing.assert_close(grad, others[name], rtol=tolerance, atol=tolerance * scale)


def experts_of(model):
    """Return the outermost wrappers around experts."""
    return [m for n, m in model.named_modules() if n.endswith(".experts")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_models_train_as_unpatched_ones(family):
    plain = causal(family)
    model = copy.deepcopy(plain)
    report = lk.patch_peft(model)
    assert not report.left
    for _ in range(2):
        assert_same_step(model, plain)
        for each in (model, plain):
            with torch.no_grad():
                for p in each.parameters():
                    if p.requires_grad:
                        p.sub_(p.grad, alpha=0.01)
    used = [lk.report(model).layers[n] for n, m in model.named_modules() if n.endswith(".experts")]
    assert used
    assert all(use.fused == 2 and not use.left for use in used)


class Block(nn.Module):
    """A module of experts alone, with a name that PEFT can target."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x, ids, gates):
        return self.experts(x, ids, gates)


def block(dtype=torch.float32, both=True, adapters=1, num=5, hidden=16, inner=8, r=3, **lora):
    """Return a PEFT model of Qwen3-MoE's experts and a call's arguments."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=inner, num_experts=num, num_experts_per_tok=2
    )
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config)
    for p in experts.parameters():
        nn.init.normal_(p, std=hidden**-0.5)
    targets = ["experts.gate_up_proj", "experts.down_proj"][: 1 + both]

    def given():
        return peft.LoraConfig(
            r=r, lora_alpha=4, target_modules=[], target_parameters=targets,
            init_lora_weights=False, **lora,
        )  # fmt: skip

    model = peft.get_peft_model(Block(experts).to(dtype), given())
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", given())
    gates, ids = torch.randn(11, num).softmax(-1).topk(2)
    return model, (torch.randn(11, hidden, dtype=dtype), ids, gates.to(dtype))


def results(model, x, ids, gates):
    """Return y and the gradients of x, the gates and what is trained."""
    x, gates = x.detach().requires_grad_(), gates.detach().requires_grad_()
    y = model(x, ids, gates)
    trained = [p for p in model.parameters() if p.requires_grad]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y.detach(), *torch.autograd.grad(y, [x, gates, *trained], dy)


def assert_same_block(model, plain, given, tolerance=1e-5):
    for got, expected in zip(results(model, *given), results(plain, *given), strict=True):
        scale = max(expected.abs().max().item(), 1e-3)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


def patched(plain, **how):
    model = copy.deepcopy(plain)
    lk.patch_peft(model, **how)
    return model


def layer_of(model):
    return experts_of(model)[0]


def use_of(model):
    return lk.report(model).layers["base_model.model.experts"]


@pytest.mark.parametrize("impl", ["auto", "eager", "reference"])
@pytest.mark.parametrize("both", [True, False], ids=["both", "gate_up"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_block(both, adapters, impl):
    plain, given = block(both=both, adapters=adapters)
    if adapters > 1:
        plain.base_model.set_adapter(["default", "a1"])
    model = patched(plain, impl=impl)
    assert_same_block(model, plain, given)
    assert use_of(model).fused == 1
    assert not use_of(model).left


def test_several_adapters_of_float16_under_autocast():
    plain, given = block(torch.float16, adapters=2)
    plain.base_model.set_adapter(["default", "a1"])
    model = patched(plain)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(*given), plain(*given), rtol=0.05, atol=0.05)
    assert use_of(model).fused == 1


@pytest.mark.parametrize("rank", [1, 5])
def test_each_expert_has_columns_of_its_own(rank):
    """E = R too: against PEFT's own delta, expert by expert, not against a view of ours."""
    plain, (x, _, _) = block(r=rank, num=5)
    model, wrapper = patched(plain), layer_of(plain)
    with torch.no_grad():
        wrapper.lora_B["default"].weight.copy_(torch.arange(5 * rank).float())
        layer_of(model).lora_B["default"].weight.copy_(wrapper.lora_B["default"].weight)
    delta = wrapper.get_delta_weight("default")
    assert not delta[0].allclose(delta[1])
    for expert in range(5):
        given = x, torch.full((11, 1), expert), torch.ones(11, 1)
        assert_same_block(model, plain, given)


def test_switching_merging_saving_and_unpatching_are_peft_s(tmp_path):
    plain, given = block(adapters=2)
    model = patched(plain)

    def both(change):
        for each in (model, plain):
            change(each)
        assert_same_block(model, plain, given)

    both(lambda m: m.set_adapter("a1"))
    both(lambda m: m.set_adapter("default"))
    for each in (model, plain):
        each.merge_adapter()
    assert use_of(model).state == "merged: default"
    torch.testing.assert_close(model(*given), plain(*given))
    both(lambda m: m.unmerge_adapter())
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(*given), plain(*given))
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    plain.load_adapter(tmp_path, "again")
    plain.set_adapter("again")
    torch.testing.assert_close(model(*given), plain(*given))
    fused = use_of(model).fused
    assert lk.unpatch_peft(model) == 2
    assert_same_block(model, plain, given)
    assert fused
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(*given), model(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ["add_adapter", "load_adapter", "inject_adapter_in_model"])
def test_an_adapter_is_added_to_a_patched_model(by, tmp_path):
    """PEFT finds the wrappers of the first adapter by the name of their class."""
    plain, given = block()
    model = patched(plain)
    plain.save_pretrained(tmp_path)
    for each in (model, plain):
        config = copy.deepcopy(each.peft_config["default"])
        torch.manual_seed(1)
        if by == "load_adapter":
            each.load_adapter(tmp_path, "b")
        elif by == "add_adapter":
            each.add_adapter("b", config)
        else:
            peft.inject_adapter_in_model(config, each.base_model.model, "b")
        layer_of(each).set_adapter("b")
        layer_of(each).base_layer.set_adapter("b")
    assert_same_block(model, plain, given)
    assert use_of(model).fused == 1
    other = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(other(*given), model(*given))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_with_another_routing_on_recomputation(reentrant):
    """What is saved has shapes that no routing changes; the recomputed routing is what counts."""
    plain, (x, ids, gates) = block()
    model = patched(plain)
    routings = [ids, ids.flip(0)]

    def run(each):
        calls = iter(routings)
        start = x.clone().requires_grad_()
        y = checkpoint(lambda x: each(x, next(calls), gates), start, use_reentrant=reentrant)
        y.sum().backward()
        return start.grad, [p.grad.clone() for p in each.parameters() if p.requires_grad]

    torch.testing.assert_close(run(model), run(plain))


@pytest.mark.unpoisoned
def test_compiled_whole():
    plain, given = block()
    model = patched(plain)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    x, ids, gates = given
    assert_same_block(compiled, plain, given)
    assert_same_block(compiled, plain, (x, ids.flip(0), gates))


def test_bfloat16_with_float32_adapters_and_autocast():
    plain, given = block(torch.bfloat16)
    for wrapper in (layer_of(plain), layer_of(plain).base_layer):
        wrapper.lora_A.float(), wrapper.lora_B.float()
    model = patched(plain)
    assert_same_block(model, plain, given, 0.05)
    x, ids, gates = given
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_block(model, plain, (x.float(), ids, gates.float()), 0.05)
    assert use_of(model).fused == 2


def test_ids_beyond_the_experts_have_no_part():
    plain, (x, ids, gates) = block()
    model, ids = patched(plain), torch.where(torch.arange(11)[:, None] == 3, 5, ids)
    y = model(x, ids, gates)
    assert not y[3].any()
    torch.testing.assert_close(y[4:], plain(x[4:], ids[4:], gates[4:]))


def test_wrong_columns_would_be_seen():
    """The comparison can fail: experts' columns read as if they lay one after the other."""
    plain, given = block(r=3)
    with torch.no_grad():
        weight = layer_of(plain).lora_B["default"].weight
        wrong = copy.deepcopy(plain)
        n = weight.shape[0]
        moved = weight.view(n, 3, 5).transpose(1, 2).reshape(n, 15)
        layer_of(wrong).lora_B["default"].weight.copy_(moved)
    with pytest.raises(AssertionError):
        assert_same_block(patched(wrong), plain, given)


def test_named_implementations_and_reports():
    model, _ = block()
    found = lk.patch_peft(model)
    assert found.patched == ["base_model.model.experts", "base_model.model.experts.base_layer"]
    assert set(found.implementations) == set(found.patched)
    lk.unpatch_peft(model)
    left = lk.patch_peft(model, impl="cuda").left
    assert set(left.values()) == {"'cuda' has no grouped_lora_linear"}

"""LoRAExperts: against PEFT's, dropout, merging, fallbacks, bad arguments."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import lora_kernels as lk
from lora_kernels.operands.dropout import drawn

E, H, I, T, SLOTS = 3, 12, 8, 7, 2  # noqa: E741  experts, hidden and inner size, tokens
MIXTRAL = transformers.MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E)
KINDS = {
    "gated": (MixtralExperts, MIXTRAL),
    "stored as [E, K, N], biases": (
        GptOssExperts,
        transformers.GptOssConfig(hidden_size=H, intermediate_size=I, num_local_experts=E),
    ),
    "without a gate": (
        NemotronHExperts,
        transformers.NemotronHConfig(
            hidden_size=H, moe_intermediate_size=I, n_routed_experts=E, moe_latent_size=None
        ),
    ),
}


def experts(kind="gated", dtype=torch.float64, how="eager"):
    make, config = KINDS[kind]
    config._experts_implementation = how
    module = make(config).to(dtype)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def adapted(kind="gated", dtype=torch.float64, how="eager", **settings):
    layer = lk.LoRAExperts.from_experts(experts(kind, dtype, how), **{"r": 2} | settings)
    for p in layer.lora_B.values():
        nn.init.normal_(p)
    return layer


def call(dtype=torch.float64):
    x = torch.randn(T, H, dtype=dtype, requires_grad=True)
    ids = torch.stack([torch.randperm(E)[:SLOTS] for _ in range(T)])
    return x, ids, torch.rand(T, SLOTS, dtype=dtype)


def results(layer, x, ids, gates, *parameters):
    y = layer(x, ids, gates)
    return y, *torch.autograd.grad(y.square().sum(), (x, *parameters))


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def used(layer):
    return lk.report(nn.ModuleDict({"experts": layer})).layers["experts"]


@pytest.mark.parametrize("names", [None, ["down_proj"]])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_pefts_wrappers_do(kind, names):
    peft = pytest.importorskip("peft")
    layer = adapted(kind, target_parameters=names)
    plain = nn.ModuleDict({"experts": copy.deepcopy(layer.base_layer)})
    targets = [f"experts.{name}" for name in layer.lora_A]
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=[], target_parameters=targets)
    theirs = peft.get_peft_model(plain, config).base_model.model["experts"]
    wrapper, factors = theirs, {}
    for name in reversed(layer.lora_A):
        assert wrapper.parameter_name == name
        factors[name] = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        with torch.no_grad():
            factors[name][0].copy_(layer.lora_A[name])
            factors[name][1].copy_(layer.lora_B[name])
        wrapper = wrapper.base_layer
    given = call()
    own = [p for name in layer.lora_A for p in (layer.lora_A[name], layer.lora_B[name])]
    others = [p for name in layer.lora_A for p in factors[name]]
    assert_same(results(layer, *given, *own), results(theirs, *given, *others))
    assert used(layer).fused == 1


def test_only_the_adapter_is_trained_and_starts_as_nothing():
    base = experts()
    layer = lk.LoRAExperts.from_experts(base, r=4)
    given = call()
    assert torch.equal(layer(*given), experts_alone(base, *given))
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    names = ("gate_up_proj", "down_proj")
    assert trained == {f"lora_{factor}.{name}" for factor in "AB" for name in names}
    a = layer.lora_A["gate_up_proj"]
    assert a.shape == (E * 4, H)
    assert a.abs().max() <= H**-0.5  # PEFT's range


def experts_alone(base, *given):
    """Return what the experts compute in the order of sums that a fused call has."""
    layer = lk.LoRAExperts.from_experts(base, r=1)
    return layer(*given)


def test_each_expert_of_a_token_has_a_mask_of_its_own():
    """Its rows are a token's experts one after the other, whatever the order of experts is."""
    layer = adapted(lora_dropout=0.5)
    x, ids, gates = call()
    torch.manual_seed(5)
    y = layer(x, ids, gates)
    torch.manual_seed(5)
    masks = [
        lk.dropout_mask((T, SLOTS, width), 0.5, drawn(0.5, None, x.device).seed) for width in (H, I)
    ]
    expected = torch.zeros_like(y)
    base, scaling = layer.base_layer, layer.scaling

    def linear(name, v, e, mask):
        a, b = layer.lora_A[name].view(E, 2, -1)[e], layer.lora_B[name].view(-1, 2, E)[..., e]
        return getattr(base, name)[e] @ v + scaling * b @ (a @ (v * mask * 2))

    for t in range(T):
        for j in range(SLOTS):
            e = ids[t, j]
            gate, up = linear("gate_up_proj", x[t], e, masks[0][t, j]).chunk(2)
            inner = base.act_fn(gate) * up
            expected[t] += gates[t, j] * linear("down_proj", inner, e, masks[1][t, j])
    torch.testing.assert_close(y, expected)
    layer.eval()
    assert not torch.allclose(layer(x, ids, gates), y)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_taking_back(kind):
    layer, given = adapted(kind), call()
    own = {name: p.clone() for name, p in layer.base_layer.named_parameters()}
    y = layer(*given)
    layer.merge()
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(*given), y)
    twin = copy.deepcopy(layer)
    layer.unmerge()
    assert not layer.merged
    twin.unmerge()
    for each in (layer, twin):
        assert all(torch.equal(p, own[n]) for n, p in each.base_layer.named_parameters())
        assert torch.equal(each(*given), y)


def test_what_others_wrote_to_merged_weights_stays():
    layer = adapted()
    own = layer.base_layer.down_proj.clone()
    layer.merge()
    with torch.no_grad():
        layer.base_layer.down_proj.add_(1)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.down_proj, own + 1)


def test_a_merge_that_fails_changes_nothing():
    layer = adapted()
    up = layer.base_layer.gate_up_proj
    layer.base_layer.down_proj.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"base_layer.down_proj: expected memory"):
        layer.merge()
    assert layer.base_layer.gate_up_proj is up
    assert not layer.merged


def test_hooks_of_the_experts_are_called():
    layer, given = adapted(), call()
    own = [*layer.lora_A.values(), *layer.lora_B.values()]
    fused, seen = results(layer, *given, *own), []
    with torch.no_grad():
        handle = layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert_same(results(layer, *given, *own), fused)
    assert seen
    assert used(layer).fused == 1
    assert used(layer).reason == "base layer has hooks"
    layer.lora_dropout = 0.5
    with pytest.raises(RuntimeError, match=r"lora_dropout: expected 0 .* hook"):
        layer(*given)
    handle.remove()
    layer(*given)
    assert used(layer).fused == 2


@pytest.mark.unpoisoned
def test_a_compiled_layer_is_one_graph():
    layer, given = adapted(dtype=torch.float32), call(torch.float32)
    own = [*layer.lora_A.values(), *layer.lora_B.values()]
    expected = results(layer, *given, *own)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for found, other in zip(results(compiled, *given, *own), expected, strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_draws_the_same_masks(reentrant):
    layer, given = adapted(lora_dropout=0.3), call()
    own = [*layer.lora_A.values(), *layer.lora_B.values()]
    torch.manual_seed(3)
    expected = results(layer, *given, *own)
    torch.manual_seed(3)
    y = checkpoint(layer, *given, use_reentrant=reentrant)
    y.square().sum().backward()
    assert_same([y, given[0].grad, *(p.grad for p in own)], expected)


def parallel():
    module = experts()
    module._is_expert_parallel = True
    return module


WRONG = {
    "a linear layer": (lambda: nn.Linear(3, 4), {}, TypeError, "experts: expected .* Linear"),
    "expert parallel": (parallel, {}, TypeError, "experts: expected .* expert parallel"),
    "a name": (experts, {"target_parameters": "down_proj"}, ValueError, "target_parameters: exp"),
    "no name": (experts, {"target_parameters": []}, ValueError, "target_parameters: expected"),
    "another name": (experts, {"target_parameters": ["up_proj"]}, ValueError, "got .*up_proj"),
    "rank": (experts, {"r": 0}, ValueError, "r: expected"),
    "dropout": (experts, {"lora_dropout": 1.0}, ValueError, "lora_dropout: expected"),
    "impl": (experts, {"impl": "fast"}, ValueError, "impl: expected"),
    "integers": (lambda: whole(), {}, TypeError, "experts: expected gate_up_proj"),
}


def whole():
    module = experts()
    module.gate_up_proj = nn.Parameter(torch.ones(E, 2 * I, H, dtype=torch.int8), False)
    return module


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments_are_named_and_change_nothing(case):
    make, settings, error, message = WRONG[case]
    module = make()
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    with pytest.raises(error, match=message):
        lk.LoRAExperts.from_experts(module, **settings)
    assert {name: p.requires_grad for name, p in module.named_parameters()} == before


def test_settings_are_keywords():
    with pytest.raises(TypeError, match="target_parameters: expected as a keyword"):
        lk.LoRAExperts.from_experts(experts(), 8)


def test_factors_that_somebody_cut_are_named():
    layer = adapted()
    layer.lora_A["down_proj"].data = layer.lora_A["down_proj"].data[:-1]
    with pytest.raises(ValueError, match="down_proj: expected lora_A, lora_B of 3 experts"):
        layer(*call())

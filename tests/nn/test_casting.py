"""16-bit copies of float32 weights for autocast: the same results, dropped as packed ones are."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.operands.held import CastWeight
from lora_kernels.prepack import reason_left
from tests.nn.test_prepack import (
    _in_place,
    _loaded,
    _moved,
    _other_memory,
    _replaced,
    gradients,
    make_model,
    needs_packing,
)

BF16, F16 = torch.bfloat16, torch.float16
each_dtype = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)


def held(model):
    return [isinstance(m._lora_kernels_packed, CastWeight) for m in (model[0], model[2])]


def saved_bytes(model, x, dtype):
    """Bytes that a forward keeps for backward, beside the parameters and the held copies."""
    kept = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept |= {
        m._lora_kernels_packed.copy.untyped_storage().data_ptr()
        for m in model.modules()
        if getattr(m, "_lora_kernels_packed", None) is not None
    }
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in kept:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype):
        y = model(x)
    return sum(found.values()), y


@each_dtype
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_results_are_those_of_a_cast_at_each_call(dtype, settings):
    model = make_model(**settings)
    x, dy = torch.randn(7, 48), torch.randn(7, 40).to(dtype)
    with torch.autocast("cpu", dtype):
        expected = gradients(model, x, dy)
    report = lk.cast_weights_(model, dtype)
    assert (report.cast, report.left) == (["0", "2"], {})
    assert report.nbytes == (48 * 64 + 64 * 40) * 2
    with torch.autocast("cpu", dtype):
        results = gradients(model, x, dy)
    assert held(model) == [True, True]
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=0, atol=0)


def test_the_copy_is_what_a_call_reads_and_saves():
    model, x = make_model(), torch.randn(512, 48)
    before, _ = saved_bytes(model, x, BF16)
    lk.cast_weights_(model)
    after, _ = saved_bytes(model, x, BF16)
    weights = sum(layer.base_layer.weight.nbytes // 2 for layer in (model[0], model[2]))
    assert before - after == weights
    model[0]._lora_kernels_packed.copy.zero_()  # which nothing else could show
    model[2]._lora_kernels_packed.copy.zero_()
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.lora_B.weight)
        nn.init.zeros_(layer.bias)
    with torch.autocast("cpu", BF16):
        assert not model(x).any()
    assert model(x).any()  # without autocast the weight itself
    with torch.autocast("cpu", F16):
        assert model(x).any()  # and with one to another dtype


@pytest.mark.parametrize("change", [_in_place, _replaced, _other_memory, _moved, _loaded])
def test_a_changed_weight_is_used_and_the_copy_dropped(change):
    model = make_model()
    lk.cast_weights_(model)
    change(model)
    x = torch.randn(5, 48, dtype=torch.float32)
    with torch.autocast("cpu", BF16):
        if model[0].base_layer.weight.dtype == torch.float64:
            with pytest.raises(TypeError, match="float64"):
                model[0](x)
        else:
            y = model[0](x)
            assert torch.equal(y, copy.deepcopy(model)[0](x))
    assert model[0]._lora_kernels_packed is None
    assert "moved or changed; call cast_weights_ again)" in str(lk.report(model))


def test_a_copy_outlives_a_merge_and_no_deep_copy():
    model, x = make_model(), torch.randn(5, 48)
    names = [*model.state_dict(), *dict(model.named_parameters())]
    lk.cast_weights_(model)
    assert names == [*model.state_dict(), *dict(model.named_parameters())]
    with torch.autocast("cpu", BF16):
        expected = model(x)
        model[0].merge()
        torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
        model[0].unmerge()
        assert torch.equal(model(x), expected)
    assert held(model) == [True, True]
    assert held(copy.deepcopy(model)) == held(pickle.loads(pickle.dumps(model))) == [False, False]


def test_a_weight_that_is_trained_is_not_held():
    """Fused optimizers don't move its version."""
    layer, x = lk.LoRALinear(24, 24, r=4), torch.randn(6, 24)
    lk.cast_weights_(layer)
    layer.base_layer.weight.requires_grad_()
    optimizer = torch.optim.AdamW([layer.base_layer.weight], lr=0.05, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", BF16):
            layer(x).square().sum().backward()
        assert layer.base_layer.weight.grad.any()  # the copy has no gradient
        optimizer.step()
    layer.base_layer.weight.requires_grad_(False)
    with torch.autocast("cpu", BF16):
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_what_is_left_says_why():
    model = nn.ModuleDict(
        {
            "bf16": lk.LoRALinear(8, 8, dtype=BF16),
            "trained": lk.LoRALinear(8, 8),
            "meta": lk.LoRALinear(8, 8, device="meta"),
            "good": lk.LoRALinear(8, 8),
        }
    )
    model["trained"].base_layer.weight.requires_grad_()
    report = lk.cast_weights_(model)
    assert report.cast == ["good"]
    assert report.left == {
        "bf16": "the weight is torch.bfloat16, not float32",
        "trained": "the weight is not frozen",
        "meta": "the weight is on meta",
    }
    assert "1 weights copied in 0.0 MiB, 3 left" in str(report)
    with pytest.raises(TypeError, match=r"dtype: expected torch\.bfloat16 or torch\.float16, got"):
        lk.cast_weights_(model, torch.float32)
    with pytest.raises(ValueError, match="model: expected one with LoRALinear layers"):
        lk.cast_weights_(nn.Linear(3, 4))


def test_the_report_names_what_autocast_costs_and_the_cure():
    model, x = make_model(), torch.randn(5, 48)
    model(x)
    assert "weight copies" not in str(lk.report(model))
    with torch.autocast("cpu", BF16):
        model(x)
    model(x)  # as an evaluation may
    text = str(lk.report(model))
    assert "weight copies (none: each call under autocast casts the float32 weight; load" in text
    assert "lora_kernels.cast_weights_(model, torch.bfloat16)" in text
    lk.cast_weights_(model)
    assert "weight copies (cast to torch.bfloat16): 0, 2" in str(lk.report(model))
    with torch.autocast("cpu", F16):
        model(x)
    assert "unused: the last autocast was to torch.float16" in str(lk.report(model))


def test_copies_are_made_in_inference_mode_and_serve_training():
    model, x = make_model(), torch.randn(5, 48)
    with torch.inference_mode():
        lk.cast_weights_(model)
    with torch.autocast("cpu", BF16):
        model(x).sum().backward()
    assert held(model) == [True, True]


def test_compiled_graphs_take_the_weight_itself():
    model, x = make_model(), torch.randn(5, 48)
    lk.cast_weights_(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", BF16):
        torch.testing.assert_close(compiled(x), model(x))


def test_packing_packs_the_copy_where_it_can_be():
    model, x = make_model(), torch.randn(5, 48)
    lk.prepack_(model)
    lk.cast_weights_(model)  # what was packed of the weight itself is gone
    assert held(model) == [True, True]
    report = lk.prepack_(model)
    reason = reason_left(torch.empty(8, 8, dtype=BF16))
    assert report.left == ({} if reason is None else {"0": reason, "2": reason})
    assert held(model) == [True, True]
    with torch.autocast("cpu", BF16):
        y = model(x)
        assert lk.unprepack_(model) == len(report.packed)
        torch.testing.assert_close(model(x), y)
    assert held(model) == [True, True]


@pytest.fixture
def peft_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    base = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40), nn.Embedding(3, 4))
    return peft.get_peft_model(base, config)


def layers_of(model):
    return [m for m in model.modules() if hasattr(m, "_lora_kernels_calls")]


def test_patched_peft_layers(peft_model):
    model, x = nn.Sequential(*[*peft_model.base_model.model][:3]), torch.randn(9, 48)
    report = lk.patch_peft(peft_model, cast_weights=True)
    assert len(report.cast_weights.cast) == 2
    assert "2 weights copied" in str(report)
    with torch.autocast("cpu", BF16):
        expected = model(x)
        assert all(layer._lora_kernels_packed.copy.dtype == BF16 for layer in layers_of(model))
        peft_model.merge_adapter()  # writes through .data
        assert not any(layer._lora_kernels_packed for layer in layers_of(model))
        peft_model.unmerge_adapter()
        assert all(layer._lora_kernels_packed for layer in layers_of(model))
        torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
        lk.patch_peft(peft_model, cast_weights=F16)
        assert all(layer._lora_kernels_packed.copy.dtype == F16 for layer in layers_of(model))
    with torch.autocast("cpu", F16):
        lk.patch_peft(peft_model, cast_weights=True)  # autocast's own
    assert all(layer._lora_kernels_packed.copy.dtype == F16 for layer in layers_of(model))
    with pytest.raises(TypeError, match=r"cast_weights: expected torch\.bfloat16 or"):
        lk.patch_peft(peft_model, cast_weights=torch.float64)
    lk.unpatch_peft(peft_model)
    assert not any("_lora_kernels_packed" in vars(layer) for layer in model)


@pytest.mark.parametrize("init", ["olora", "pissa"])
@pytest.mark.parametrize(
    "cast", [pytest.param(False, marks=needs_packing), True], ids=["packed", "cast"]
)
def test_an_added_adapter_that_changes_the_weight(init, cast):
    """OLoRA writes through .data into the weight's own memory, PiSSA gives it another one."""
    peft = pytest.importorskip("peft")
    how = {"r": 4, "target_modules": ["0"]}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(48, 64)), peft.LoraConfig(**how))
    other = copy.deepcopy(model)
    lk.patch_peft(other, cast_weights=cast, prepack=not cast)
    x, found = torch.randn(9, 48), []
    for each in (model, other):
        each.add_adapter("second", peft.LoraConfig(init_lora_weights=init, **how))
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            found.append(each(x))
    torch.testing.assert_close(*found, **({"rtol": 0.02, "atol": 0.02} if cast else {}))
    assert "weight copies (lost: " in str(lk.report(other))


@pytest.mark.parametrize(
    "cast", [pytest.param(False, marks=needs_packing), True], ids=["packed", "cast"]
)
def test_copies_of_a_weight_that_another_layer_merges_into(cast):
    """PEFT merges through .data: layers that share the weight see it by the numbers."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    base[1].weight = base[0].weight
    config = peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    plain = peft.get_peft_model(base, config)
    model, x = copy.deepcopy(plain), torch.randn(9, 32)
    lk.patch_peft(model, cast_weights=cast, prepack=not cast)
    for change in (
        lambda layers: layers[0].merge(),
        lambda layers: layers[0].unmerge(),
        lambda layers: [layer.merge() for layer in layers],
        lambda layers: [layer.unmerge() for layer in layers],
        lambda layers: layers[0].base_layer.weight.data.mul_(2.0),
    ):
        found = []
        for each in (plain, model):
            layers = list(each.base_model.model)
            change(layers)
            with torch.no_grad(), torch.autocast("cpu", BF16, enabled=cast):
                found.append(layers[1](x))
        error = 2e-2 if cast else 1e-5
        torch.testing.assert_close(*found, rtol=error, atol=error)
    assert "lost" in str(lk.report(model))


def test_copies_of_an_emptied_weight_are_not_compared():
    layer = lk.LoRALinear(32, 32)
    lk.cast_weights_(layer)
    held = layer._lora_kernels_packed
    assert held.holds(layer.base_layer.weight)
    layer.base_layer.weight.untyped_storage().resize_(0)
    assert not held.holds(layer.base_layer.weight)

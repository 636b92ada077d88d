"""PEFT in breadth: whatever PEFT does to a model, a patched one computes and saves the same."""

import copy
import io
import json
import sys

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels._peft.linear import FusedLinear
from tests.stacks.models import (
    LINEARS,
    FusedCalls,
    adapted_llama,
    adapters,
    assert_close,
    assert_same_choices,
    assert_same_gradients,
    llama,
    lora_config,
    patched_copy,
    peft,
    randomize,
    tokens,
)

hotswap = pytest.importorskip("peft.utils.hotswap")
LoraLinear = peft.tuners.lora.Linear
LAYERS = 14


def loss_of(model, rows):
    return model(input_ids=rows, labels=rows, use_cache=False).loss


def assert_same(patched, plain, fused, rows=None):
    """Compare loss and gradients; `fused` is how many calls of one pass are."""
    rows = tokens() if rows is None else rows
    for model in (patched, plain):
        model.zero_grad()
    expected = loss_of(plain, rows)
    with FusedCalls() as calls:
        loss = loss_of(patched, rows)
    assert calls.count == fused
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    if loss.requires_grad:
        loss.backward()
        expected.backward()
        assert_same_gradients(patched, plain)
    return expected.item()


# Settings of LoraConfig (and of the base model), how many layers are left to PEFT and why, how many
# calls a pass has.
CONFIGURATIONS = {
    "rsLoRA": ({"use_rslora": True}, {}, {}, LAYERS),
    "lora_bias": ({"lora_bias": True, "bias": "lora_only"}, {"attention_bias": True}, {}, LAYERS),
    "bias all": ({"bias": "all"}, {"attention_bias": True, "mlp_bias": True}, {}, LAYERS),
    "all-linear": ({"target_modules": "all-linear"}, {}, {}, LAYERS),
    "rank and alpha patterns": (
        {
            "rank_pattern": {"q_proj": 7, r".*layers\.1\.mlp\.up_proj": 1},
            "alpha_pattern": {"k_proj": 3},
        },
        {},
        {},
        LAYERS,
    ),
    "modules_to_save": ({"modules_to_save": ["lm_head", "norm"]}, {}, {}, LAYERS),
    "lm_head adapted": ({"target_modules": [*LINEARS, "lm_head"]}, {}, {}, LAYERS + 1),
    "tied, embeddings saved": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"tie_word_embeddings": True},
        {},
        LAYERS,
    ),
    "tied, both adapted": (
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"tie_word_embeddings": True},
        {},
        2,
    ),
    "layer replication": ({"layer_replication": [[0, 2], [1, 2]]}, {}, {}, LAYERS + 7),
    "trained tokens": ({"trainable_token_indices": [3, 5]}, {}, {}, LAYERS),
    "PiSSA": ({"init_lora_weights": "pissa"}, {}, {}, LAYERS),
    "DoRA": ({"use_dora": True}, {}, {}, LAYERS),
    "a parameter": (
        {"target_parameters": ["mlp.up_proj.weight"], "target_modules": ["q_proj"]},
        {},
        {"weight has no experts, or one": 2},
        2,
    ),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_configurations_are_fused_as_unpatched(case):
    config, base, left, fused = CONFIGURATIONS[case]
    seed, models = torch.initial_seed(), []
    for _ in range(2):  # made twice: PEFT's tied adapters can't be copied
        torch.manual_seed(seed)
        models.append(adapted_llama(base=llama(**base), **config))
    patched, plain = models
    report = lk.patch_peft(patched)
    reasons = list(report.left.values())
    assert {reason: reasons.count(reason) for reason in reasons} == left
    rows = torch.tensor([[1, 3, 5, 8, 3, 9, 4, 2]]).expand(2, -1)
    before = assert_same(patched, plain, fused, rows)
    for model in (patched, plain):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        optimizer.step()
    assert assert_same(patched, plain, fused, rows) < before


@pytest.fixture
def pair():
    """A patched and an unpatched model with the adapters "default" and, of rank 2, "second"."""
    plain = adapted_llama()
    plain.add_adapter("second", lora_config(r=2, target_modules=["q_proj", "down_proj"]))
    return patched_copy(randomize(plain)), plain


def for_layers(change):
    return lambda model: [change(m) for m in model.modules() if isinstance(m, LoraLinear)]


def test_several_adapters_are_switched_added_and_deleted(pair):
    losses = []

    def check(fused, change=lambda model: None):
        for model in pair:
            torch.manual_seed(1)
            change(model)
        losses.append(assert_same(*pair, fused, tokens()))

    check(LAYERS)
    check(4, lambda m: m.set_adapter("second"))
    check(4, lambda m: m.set_adapter("default", inference_mode=True) or m.set_adapter("second"))
    # Both active: four layers have both, the others one.
    check(LAYERS, lambda m: m.base_model.set_adapter(["default", "second"]))
    check(LAYERS, lambda m: m.delete_adapter("second"))
    check(LAYERS, for_layers(lambda layer: layer.set_scale("default", 0.5)))
    check(LAYERS, for_layers(lambda layer: layer.scale_layer(3.0)))
    check(LAYERS, for_layers(lambda layer: layer.unscale_layer()))
    assert len(set(losses)) == 5  # "second", "default" and unscaling occur twice


@pytest.mark.parametrize(
    "combination", ["linear", "cat", "svd", "ties", "dare_linear", "ties_svd", "magnitude_prune"]
)
def test_add_weighted_adapter(combination):
    plain = adapted_llama()
    plain.add_adapter("second", lora_config())
    patched = patched_copy(randomize(plain))
    options = {} if combination in ("linear", "cat", "svd") else {"density": 0.5}
    for model in (patched, plain):
        torch.manual_seed(3)
        model.add_weighted_adapter(
            ["default", "second"], [0.7, 0.4], "sum", combination_type=combination, **options
        )
        model.set_adapter("sum")
    assert_same(patched, plain, LAYERS)
    expected = plain.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in patched.state_dict().items())


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_an_adapter_is_loaded_on_meta_first(tmp_path):
    plain = adapted_llama(lora_bias=True)
    plain.save_pretrained(tmp_path)
    patched = patched_copy(plain)
    for model in (patched, plain):
        model.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
        model.set_adapter("second")
    assert_same(patched, plain, LAYERS)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_an_adapter_left_on_meta_is_pefts_to_refuse():
    plain = adapted_llama(lora_bias=True)
    patched = patched_copy(plain)
    for model in (patched, plain):
        model.base_model.model.model.layers[0].mlp.up_proj.lora_B.to("meta")
    reasons = {use.state for use in lk.report(patched).layers.values() if use.state}
    assert reasons == {"lora_B's bias is on meta, the base layer on cpu"}
    for model in (patched, plain):
        with pytest.raises(RuntimeError, match="meta"):
            loss_of(model, tokens())


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    ("change", "raises"),
    [
        (lambda bias: bias[:1], None),  # PEFT broadcasts it
        (lambda bias: bias[:-1], "shape|size"),
        (lambda bias: bias.to("meta"), "meta"),
        (lambda bias: bias.int(), "dtype"),
        (lambda bias: bias.to_sparse(), None),
    ],
    ids=["one element", "too short", "on meta", "integers", "sparse"],
)
def test_a_base_bias_that_does_not_fit_beside_lora_bias(change, raises):
    base, config = nn.Linear(8, 6), peft.LoraConfig(r=2, target_modules=["0"], lora_bias=True)
    plain = randomize(peft.get_peft_model(nn.Sequential(base), config))
    patched, x = patched_copy(plain), torch.randn(8)  # torch adds a sparse bias to no more
    for model in (patched, plain):
        layer = model.base_model.model[0].base_layer
        layer.bias = nn.Parameter(change(layer.bias.detach()), requires_grad=False)
    lk.report(patched)  # in any state
    if raises is None:
        assert_close(patched(x), plain(x), 1e-6, "y")
        return
    for model in (patched, plain):
        with pytest.raises(RuntimeError, match=raises):
            model(x)


def test_nested_disable_adapter(pair):
    rows = tokens()
    for model in pair:
        model.eval()
    with torch.no_grad():
        adapted = assert_same(*pair, LAYERS, rows)
        patched, plain = pair
        with patched.disable_adapter(), plain.disable_adapter():
            outer = assert_same(*pair, 0, rows)
            with patched.disable_adapter(), plain.disable_adapter():
                assert assert_same(*pair, 0, rows) == outer != adapted
            assert_same(*pair, 0, rows)
        assert assert_same(*pair, LAYERS, rows) == adapted
        with pytest.raises(RuntimeError, match="inside"), patched.disable_adapter():
            raise RuntimeError("inside")
        assert_same(*pair, LAYERS, rows)


@pytest.mark.parametrize("prepack", [False, True], ids=["", "prepacked"])
def test_partial_merge_and_unmerge(pair, prepack):
    patched, plain = pair
    if prepack:
        lk.prepack_(patched)
    rows = tokens()
    weights = {name: p.clone() for name, p in patched.named_parameters() if "base_layer" in name}

    def check(fused, change):
        for model in (patched, plain):
            change(model)
        with torch.no_grad():
            return assert_same(patched, plain, fused, rows)

    both = check(LAYERS, lambda m: m.base_model.set_adapter(["default", "second"]))
    # In PEFT a layer that holds one merged adapter computes no other one.
    assert check(LAYERS - 4, lambda m: m.merge_adapter(["second"])) != pytest.approx(both)
    assert check(0, lambda m: m.merge_adapter(["default"])) == pytest.approx(both, rel=1e-5)
    assert check(LAYERS, lambda m: m.unmerge_adapter()) == pytest.approx(both, rel=1e-5)
    single = check(LAYERS, lambda m: m.set_adapter("default"))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    merged = check(LAYERS - 1, lambda m: m.get_submodule(layer).merge(safe_merge=True))
    assert merged == pytest.approx(single, rel=1e-5)
    assert check(LAYERS, lambda m: m.get_submodule(layer).unmerge()) == pytest.approx(single)
    for name, weight in weights.items():
        assert_close(patched.get_parameter(name), weight, 1e-5, name)


@pytest.mark.parametrize("names", [None, ["second"]], ids=["active adapter", "the other"])
def test_merge_and_unload(pair, names):
    rows = tokens()
    merged = [model.merge_and_unload(safe_merge=True, adapter_names=names) for model in pair]
    assert not any(isinstance(module, FusedLinear) for module in merged[0].modules())
    expected = merged[1].state_dict()
    assert expected.keys() == merged[0].state_dict().keys()
    assert all(torch.equal(value, expected[key]) for key, value in merged[0].state_dict().items())
    torch.testing.assert_close(loss_of(merged[0], rows), loss_of(merged[1], rows), rtol=0, atol=0)


def content(path):
    """Return a file's bytes; of JSON the values, since PEFT writes sets in any order."""
    if path.suffix != ".json":
        return path.read_bytes()
    values = json.loads(path.read_text())
    return {k: sorted(v) if k == "target_modules" else v for k, v in values.items()}


def test_saving_and_loading(pair, tmp_path):
    patched, plain = pair
    for model, name in ((patched, "patched"), (plain, "plain")):
        model.save_pretrained(tmp_path / name)
    files = [path for path in (tmp_path / "plain").rglob("*") if path.is_file()]
    assert len([file for file in files if file.suffix == ".safetensors"]) == 2
    for file in files:
        ours = tmp_path / "patched" / file.relative_to(tmp_path / "plain")
        assert content(ours) == content(file), file
    base = copy.deepcopy(plain).unload()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "patched", is_trainable=True)
    lk.patch_peft(loaded)
    loaded.load_adapter(tmp_path / "patched" / "second", "second", is_trainable=True)
    for name in ("default", "second"):
        for model in (loaded, plain):
            model.set_adapter(name)
        assert_same(loaded, plain, LAYERS if name == "default" else 4)
    state = peft.get_peft_model_state_dict(patched)
    randomize(loaded).set_adapter("default")
    peft.set_peft_model_state_dict(loaded, state)
    plain.set_adapter("default")
    assert_same(loaded, plain, LAYERS)


def test_copies_and_files_of_a_whole_patched_model(pair):
    patched, plain = pair
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(patched), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert_same(loaded, plain, LAYERS)
    lk.unpatch_peft(loaded)
    assert_same(loaded, plain, 0)
    assert_same(patched, plain, LAYERS)


def test_float16_inference():
    plain = adapted_llama(torch.float16).half().eval()
    patched, rows = patched_copy(plain), tokens()
    models = patched, plain
    with torch.inference_mode(), FusedCalls() as fused:
        ours, theirs = (m(input_ids=rows).logits for m in models)
        generated = [m.generate(rows[:, :6], max_new_tokens=5, do_sample=False) for m in models]
    assert fused.count == LAYERS * 6
    assert ours.dtype == torch.float16
    assert_close(ours, theirs, 0.01)
    assert_same_choices(plain, *generated)


def test_mixed_batches_of_adapters(pair):
    """Requests for several adapters in one batch are PEFT's, sample by sample."""
    rows, names = tokens(3), ["default", "__base__", "second"]
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=rows, adapter_names=names).logits for m in pair)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(not use.left for use in lk.report(pair[0]).layers.values())


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.unpoisoned
def test_hot_swap(compiled, tmp_path):
    """Adapters of other rank and scaling come and go; a compiled model isn't compiled again."""
    torch._dynamo.reset()
    base = llama(num_hidden_layers=1)
    for name, rank, alpha in (("one", 4, 8), ("two", 2, 12), ("three", 8, 3)):
        config = {"r": rank, "lora_alpha": alpha}
        adapted_llama(base=copy.deepcopy(base), **config).save_pretrained(tmp_path / name)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one").eval()
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert not lk.patch_peft(model).left
    rows, call = tokens(), model
    if compiled:
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
    for index, name in enumerate(("one", "two", "three", "one")):
        if index:
            hotswap.hotswap_adapter(model, tmp_path / name, "default")
        expected = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=index > 0):
            logits = call(input_ids=rows, use_cache=False).logits
        assert_close(logits, expected(input_ids=rows).logits, what=name)


def test_data_parallel_replicas_are_fused(monkeypatch):
    """Replicas on several GPUs hold plain tensors; their gradients reach the model's parameters."""
    replicate = sys.modules["torch.nn.parallel.replicate"]
    plain = adapted_llama()
    patched, rows = patched_copy(plain), tokens(4)

    def copies(tensors, devices, detach=False):
        return [[tensor * 1 for tensor in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    with FusedCalls() as fused:
        replicas = replicate.replicate(patched, [0, 1])
        for replica, part in zip(replicas, rows.chunk(2), strict=True):
            (loss_of(replica, part) / 2).backward()
    assert fused.count == 2 * LAYERS
    loss_of(plain, rows).backward()
    assert_same_gradients(patched, plain)
    wrapped = nn.DataParallel(patched)
    assert_same(wrapped, nn.DataParallel(plain), LAYERS)  # without a GPU it calls the model itself


def test_adapters_are_what_is_trained(pair):
    """Patching changes no parameter's identity, order or trainability."""
    patched, plain = pair
    before = list(patched.named_parameters())
    lk.unpatch_peft(patched)
    for (name, p), (other, q) in zip(before, patched.named_parameters(), strict=True):
        assert name == other
        assert p is q
    assert adapters(patched).keys() == adapters(plain).keys()

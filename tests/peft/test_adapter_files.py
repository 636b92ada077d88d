"""Adapter files: PEFT's layout to the letter, both ways; a refused file or save changes nothing."""

import copy
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import lora_kernels as lk
from tests.support.adapters import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Net,
    adapt,
    assert_unchanged,
    listing,
    needs_trained_biases,
    snapshot,
)
from tests.support.paths import ROOT

# Each case: the settings of every adapted layer, and those that all of them share.
CASES = {
    "all layers": ({"q": {}, "z.q": {}, "z.k": {}, "zok": {}}, {}),
    "top q only": ({"q": {}}, {}),
    "inner q only": ({"z.q": {}}, {}),
    "rslora": ({"q": {}, "z.q": {}}, {"use_rslora": True}),
    "dropout": ({"q": {}, "z.k": {}}, {"lora_dropout": 0.3}),
    "DoRA": ({"q": {}, "z.k": {"r": 3}}, {"use_dora": True}),
    "ranks": ({"q": {"r": 1}, "z.q": {"r": 4}, "z.k": {}}, {}),
    "alphas": ({"z.k": {"lora_alpha": 3}, "zok": {"lora_alpha": 1.5}, "q": {"lora_alpha": 2}}, {}),
    "ranks and alphas": (
        {"q": {"r": 3, "lora_alpha": 1}, "z.q": {}, "z.k": {}, "zok": {"lora_alpha": 9}},
        {"use_rslora": True},
    ),
    "bias lora_only": ({"q": {}, "z.q": {}, "z.k": {}}, {"bias": "lora_only"}),
    "bias all": ({"z.q": {}, "z.k": {}}, {"bias": "all"}),
}
by_case = pytest.mark.parametrize(("settings", "shared"), CASES.values(), ids=CASES)


@by_case
def test_what_we_save_peft_loads(settings, shared, tmp_path):
    peft = pytest.importorskip("peft")
    fresh = Net().double().eval()
    ours = adapt(copy.deepcopy(fresh), settings, **shared).eval()
    if shared.get("bias") == "all":
        nn.init.normal_(ours.norm.bias)
    lk.save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as on patterns that match no layer
        theirs = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    layers = {
        path.removeprefix(PREFIX): module
        for path, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert layers.keys() == settings.keys()
    for path, layer in layers.items():
        mine = ours.get_submodule(path)
        assert (layer.r["default"], layer.scaling["default"]) == (mine.r, mine.scaling)
    assert theirs.peft_config["default"].lora_dropout == shared.get("lora_dropout", 0.0)
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(theirs(x), ours(x))


def pattern_of(settings, field):
    return {f"^{re.escape(path)}": own[field] for path, own in settings.items() if field in own}


@pytest.mark.parametrize("into", ["plain linears", "LoRALinears"])
@by_case
def test_what_peft_saves_we_load(settings, shared, into, tmp_path):
    peft = pytest.importorskip("peft")
    if shared.get("bias") == "lora_only":
        needs_trained_biases()
    fresh = Net().double().eval()
    config = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 6, **shared},
        target_modules="|".join(map(re.escape, settings)),
        rank_pattern=pattern_of(settings, "r"),
        alpha_pattern=pattern_of(settings, "lora_alpha"),
    )
    theirs = peft.get_peft_model(copy.deepcopy(fresh), config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    if into == "LoRALinears":
        ranks = {path: {"r": own.get("r", 2)} for path, own in settings.items()}
        adapt(fresh, ranks, use_dora=shared.get("use_dora", False)).eval()
    lk.load_adapter(fresh, tmp_path)
    found = {path for path, m in fresh.named_modules() if isinstance(m, lk.LoRALinear)}
    assert found == settings.keys()
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(fresh(x), theirs(x))
    for layer in map(fresh.get_submodule, found):
        assert layer.lora_dropout == shared.get("lora_dropout", 0.0)
        assert layer.bias_mode == shared.get("bias", "none")
        assert not layer.training
        assert not layer.base_layer.weight.requires_grad
        assert layer.bias is None or layer.bias.requires_grad == (layer.bias_mode != "none")
    # Nothing was lost on the way in: saved again, the adapter is the same.
    lk.save_adapter(fresh, tmp_path / "again")
    again = safetensors.torch.load_file(tmp_path / "again" / WEIGHTS)
    first = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)


def test_the_files_are_those_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    needs_trained_biases()
    fresh = Net()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["z.q", "zok"], bias="lora_only")
    peft.get_peft_model(copy.deepcopy(fresh), config).save_pretrained(tmp_path / "theirs")
    ours, theirs = tmp_path / "ours" / "deep", tmp_path / "theirs"
    lk.save_adapter(adapt(fresh, {"zok": {}, "z.q": {}}, bias="lora_only"), str(ours))
    assert listing(ours).keys() == {WEIGHTS, CONFIG}
    with safe_open(ours / WEIGHTS, "pt") as a, safe_open(theirs / WEIGHTS, "pt") as b:
        assert a.metadata() == b.metadata() == {"format": "pt"}
        assert sorted(a.keys()) == sorted(b.keys())
    our_config, their_config = (json.loads((d / CONFIG).read_text()) for d in (ours, theirs))
    assert our_config.pop("target_modules") == sorted(their_config["target_modules"])
    assert our_config.items() <= their_config.items()


def test_the_model_itself_may_be_the_layer(tmp_path):
    layer, other = lk.LoRALinear(8, 4, r=2), lk.LoRALinear(8, 4, r=2)
    nn.init.normal_(layer.lora_B.weight)
    lk.save_adapter(layer, tmp_path)
    lk.load_adapter(other, tmp_path)
    for name in ("lora_A.weight", "lora_B.weight"):
        assert torch.equal(other.get_parameter(name), layer.get_parameter(name))
    with pytest.raises(ValueError, match="inside the model"):
        lk.load_adapter(nn.Linear(8, 4), tmp_path)  # which could not be replaced


def test_merged_layers_are_saved_and_not_loaded_into(tmp_path):
    model = adapt(Net(), {"q": {}})
    lk.save_adapter(model, tmp_path)
    files = listing(tmp_path)
    model.q.merge()
    lk.save_adapter(model, tmp_path)
    assert listing(tmp_path) == files
    before = snapshot(model)
    with pytest.raises(ValueError, match="expected 'q' unmerged"):
        lk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_float32_adapter_stays_so_beside_a_bfloat16_base(tmp_path):
    lk.save_adapter(adapt(Net(), {"q": {}}), tmp_path)
    model = Net().bfloat16()
    lk.load_adapter(model, tmp_path)
    assert model.q.base_layer.weight.dtype == torch.bfloat16
    assert model.q.lora_A.weight.dtype == model.q.lora_B.weight.dtype == torch.float32


def test_a_module_whose_own_name_ends_in_base_layer(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer, self.my_base_layer = nn.Linear(4, 4), nn.Linear(4, 4)
            self.bias = nn.Parameter(torch.randn(4))

    model, other = adapt(Wrapped(), {"my_base_layer": {}}, bias="all"), Wrapped()
    lk.save_adapter(model, tmp_path)
    lk.load_adapter(other, tmp_path)
    for key in ("bias", "base_layer.bias", "my_base_layer.base_layer.bias"):
        assert torch.equal(other.get_parameter(key), model.get_parameter(key))


def test_peft_is_not_needed(tmp_path):
    script = """
import sys
sys.modules["peft"] = sys.modules["transformers"] = None  # an import of either raises
import torch, lora_kernels as lk
make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), lk.LoRALinear(4, 4, r=2))
saved, loaded = make(), make()
lk.save_adapter(saved, sys.argv[1])
lk.load_adapter(loaded, sys.argv[1])
assert torch.equal(saved[1].lora_A.weight, loaded[1].lora_A.weight)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def drop(key):
    return lambda config, tensors: tensors.pop(PREFIX + key)


def put(key, *shape, dtype=torch.float32):
    return lambda config, tensors: tensors.update({PREFIX + key: torch.ones(shape, dtype=dtype)})


def field(**fields):
    return lambda config, tensors: config.update(fields)


# What is done to a good file of layers q (rank 2) and z.k (rank 2), and what the error says.
SPOILERS = {
    "no A": (drop("z.k.lora_A.weight"), r"expected 'z\.k\.lora_A\.weight', got none"),
    "no B": (drop("q.lora_B.weight"), r"expected 'q\.lora_B\.weight', got none"),
    "extra weight": (put("norm.weight", 12), r"got key 'base_model\.model\.norm\.weight'"),
    "lora_B.bias": (put("q.lora_B.bias", 12), "expected a bias at 'q.lora_B.bias', got none"),
    "bias of no layer": (put("y.bias", 12), "expected a bias at 'y.bias', got none"),
    "bias of wrong shape": (put("z.q.bias", 3), r"z\.q\.bias: expected shape \[8\], got \[3\]"),
    "A too narrow": (put("z.k.lora_A.weight", 2, 7), r"z\.k\.lora_A: expected .*\[2, 8\], got"),
    "B too short": (put("z.k.lora_B.weight", 7, 2), r"z\.k\.lora_B: expected .*\[8, 2\], got"),
    "A of other rank": (put("z.k.lora_A.weight", 3, 8), r"z\.k\.lora_A: expected .*\[2, 8\], got"),
    "A a vector": (put("z.k.lora_A.weight", 2), r"z\.k\.lora_A: expected .*, got .*\[2\]"),
    "A a number": (put("z.k.lora_A.weight"), r"z\.k\.lora_A: expected .*, got .*\[\]"),
    "B of integers": (put("q.lora_B.weight", 12, 2, dtype=torch.int32), "got torch.int32"),
    "r not that of the tensors": (field(r=4), r"lora_A: expected .*\[4, 8\], got .*\[2, 8\]"),
    "rank_pattern likewise": (field(rank_pattern={"k": 5}), r"z\.k\.lora_A: expected .*\[5, 8\]"),
    "alpha no number": (field(lora_alpha="6"), "lora_alpha: expected a number"),
    "alpha of one layer": (field(alpha_pattern={"z.k": None}), r"z\.k: lora_alpha: expected"),
    "dropout of 1": (field(lora_dropout=1.0), "lora_dropout: expected a probability"),
    "bias mode": (field(bias="some"), "bias: expected one of"),
    "other method": (field(peft_type="IA3"), "expected peft_type LORA"),
    "DoRA": (field(use_dora=True), "expected 'q.lora_magnitude_vector', got none"),
    "lora_bias": (field(lora_bias=True), "lora_bias has no counterpart"),
    "modules_to_save": (field(modules_to_save=["norm"]), "modules_to_save has no counterpart"),
    "PiSSA": (field(init_lora_weights="pissa_niter_4"), "unchanged base weights"),
    "excluded": (field(exclude_modules=["k"]), r"expected no weights of layer 'z\.k'"),
    "OLoRA": (field(init_lora_weights="olora"), "unchanged base weights"),
}


@pytest.mark.parametrize("into", ["plain linears", "LoRALinears"])
@pytest.mark.parametrize(("spoil", "message"), SPOILERS.values(), ids=SPOILERS)
def test_a_bad_file_is_refused_and_changes_nothing(spoil, message, into, tmp_path):
    lk.save_adapter(adapt(Net(), {"q": {}, "z.k": {}}), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    spoil(config, tensors)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    model = Net() if into == "plain linears" else adapt(Net(), {"q": {}, "z.k": {}})
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def net_with(**modules):
    model = Net()
    for name, module in modules.items():
        setattr(model, name, module)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (net_with(q=nn.Identity()), "expected 'q' to be .*, got Identity"),
        (net_with(z=nn.Identity()), r"expected a layer 'z\.k', got none"),
        (net_with(q=nn.Conv1d(8, 12, 1)), r"q\.lora_A: expected .*\[2, 8, 1\], got .*\[2, 8\]"),
        (net_with(q=nn.Embedding(8, 12)), "q: expected lora_embedding_A, .* by Embedding, got"),
        (net_with(q=nn.Linear(8, 12).to(torch.float8_e4m3fn)), "q: linear: expected .*float8"),
        (adapt(Net(), {"q": {}, "zok": {}}), "expected weights of layer 'zok', got none"),
        (adapt(Net(), {"z.k": {"r": 3}}), r"z\.k\.r: expected rank 3, got 2"),
    ],
    ids=["no linear", "no layer", "conv", "embedding", "float8", "layer not in the file", "rank"],
)
def test_a_model_that_does_not_fit_is_left_alone(model, message, tmp_path):
    lk.save_adapter(adapt(Net(), {"q": {}, "z.k": {}}), tmp_path)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def cut(name, size):
    return lambda directory: os.truncate(directory / name, size)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (cut(WEIGHTS, 0), ValueError, "expected a safetensors file"),
        (cut(WEIGHTS, 100), ValueError, "expected a safetensors file"),
        (lambda d: os.truncate(d / WEIGHTS, (d / WEIGHTS).stat().st_size - 1), ValueError, WEIGHTS),
        (lambda d: (d / WEIGHTS).write_bytes(b"\x80\x02}q\x00."), ValueError, WEIGHTS),
        (cut(CONFIG, 0), ValueError, "expected JSON"),
        (cut(CONFIG, 50), ValueError, "expected JSON"),
        (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe\x00"), ValueError, "expected JSON"),
        (lambda d: (d / CONFIG).write_text("[]"), ValueError, "expected peft_type LORA"),
        (lambda d: (d / CONFIG).unlink(), FileNotFoundError, f"expected {CONFIG}"),
        (lambda d: (d / WEIGHTS).unlink(), FileNotFoundError, f"expected {WEIGHTS}"),
        (lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"), FileNotFoundError, WEIGHTS),
    ],
)
def test_a_damaged_or_absent_file_changes_nothing(spoil, error, message, tmp_path):
    model = adapt(Net(), {"q": {}, "z.k": {}})
    lk.save_adapter(model, tmp_path)
    spoil(tmp_path)
    for target in (model, Net()):
        before = snapshot(target)
        with pytest.raises(error, match=message):
            lk.load_adapter(target, tmp_path)
        assert_unchanged(target, before)


@pytest.mark.parametrize("over", ["old files", "an empty directory"])
@pytest.mark.parametrize(
    ("module", "name", "failing_call", "error"),
    [
        (safetensors.torch, "save_file", 1, OSError),
        (Path, "write_text", 1, OSError),
        (os, "replace", 1, OSError),
        (os, "replace", 2, OSError),
        (os, "replace", 2, KeyboardInterrupt),
    ],
)
def test_a_failed_save_leaves_the_directory_as_it_was(
    module, name, failing_call, error, over, tmp_path, monkeypatch
):
    real, calls = getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == failing_call:
            raise error("disk full")
        return real(*args, **kwargs)

    if over == "old files":
        lk.save_adapter(adapt(Net(), {"q": {}}), tmp_path)
    before = listing(tmp_path)
    monkeypatch.setattr(module, name, failing)
    with pytest.raises(error, match="disk full"):
        lk.save_adapter(adapt(Net(), {"q": {}, "zok": {}}), tmp_path)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net(), "expected LoRA layers, got none in Net"),
        (adapt(Net(), {"q": {"lora_dropout": 0.1}, "zok": {}}), "lora_dropout: expected one value"),
        (adapt(Net(), {"q": {"use_rslora": True}, "zok": {}}), "use_rslora: expected one value"),
        (adapt(Net(), {"q": {"bias": "lora_only"}, "zok": {}}), "bias: expected one value"),
    ],
)
def test_what_the_layout_can_not_hold_is_not_saved(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        lk.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_weights_without_memory_are_named(name, tmp_path):
    """FSDP and ZeRO-3 empty storages; torch itself would read beyond them."""
    model = lk.LoRALinear(24, 40, r=4)
    lk.save_adapter(model, tmp_path / "whole")
    getattr(model, name).weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"^{name}.weight: expected memory for shape"):
        lk.save_adapter(model, tmp_path / "emptied")
    assert not (tmp_path / "emptied").exists()
    with pytest.raises(ValueError, match=r"weight: expected memory for shape"):
        lk.load_adapter(model, tmp_path / "whole")

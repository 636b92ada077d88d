"""Which layers a file has to have, as PEFT matches them; layers without values; PEFT's models."""

import copy
import json
import random
import re

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.adapter_layout import targets
from tests.support.adapters import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Net,
    adapt,
    assert_unchanged,
    snapshot,
)


class Stack(nn.Module):
    """Layers by number, as in language models, and modules of other types with the same names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
            for _ in range(3)
        )
        self.q = nn.Conv1d(8, 8, 1)
        self.lm_head = nn.Linear(8, 9)

    def get_output_embeddings(self):
        return self.lm_head


def save(model, directory, drop=(), **fields):
    """Save an adapter, but for some layers' tensors, with other fields in its configuration."""
    lk.save_adapter(model, directory)
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **fields}))
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    kept = {k: t for k, t in tensors.items() if not k.startswith(tuple(PREFIX + d for d in drop))}
    safetensors.torch.save_file(kept, directory / WEIGHTS)


ALL = [f"layers.{i}.{name}" for i in range(3) for name in "qk"]
# The layers a file has, the fields that choose layers, and the first layer that it lacks.
CHOICES = {
    "paths": (ALL[:5], {"target_modules": ALL}, "layers.2.k"),
    "suffixes": (["layers.0.q", "layers.2.q"], {"target_modules": ["q"]}, "layers.1.q"),
    "suffixes that a convolution fits": (ALL[::2], {"target_modules": ["q"]}, "q"),
    "suffixes that an embedding fits": (ALL, {"target_modules": [*ALL, "embed"]}, "embed"),
    "long suffixes": (ALL[2:], {"target_modules": ["0.q", "1.q"]}, "layers.0.q"),
    "part of a name": (ALL[:1], {"target_modules": ["layers.0.q", "ayers.1.q", "head"]}, None),
    "names of no layer": (ALL, {"target_modules": [*ALL, "v", "gate"]}, None),
    "containers and norms": (ALL[:1], {"target_modules": ["layers.0.q", "layers", "norm"]}, None),
    "expression": (ALL[:3], {"target_modules": r"layers\.[01]\.[qk]"}, "layers.1.k"),
    "expression of a part": (ALL[:1], {"target_modules": r"layers\.0\.q|1\.q"}, None),
    "excluded suffix": (
        [f"layers.{i}.q" for i in range(3)],
        {"target_modules": ["q", "k"], "exclude_modules": ["k", "q.no"]},
        "q",
    ),
    "excluded, all there": (
        ALL[1::2],
        {"target_modules": ["q", "k"], "exclude_modules": "(.*q)"},
        None,
    ),
    "layers by number": (
        ["layers.0.k"],
        {"target_modules": ["k"], "layers_to_transform": [0, 2], "layers_pattern": ["layers"]},
        "layers.2.k",
    ),
    "one layer by number": (
        ["layers.1.k"],
        {"target_modules": ["k"], "layers_to_transform": 1, "layers_pattern": "layers"},
        None,
    ),
    "layers by a list's name": (
        ALL[2:3],
        {"target_modules": ["q", "k"], "layers_to_transform": 1, "layers_pattern": "layers"},
        "layers.1.k",
    ),
    "another list's name": (
        ALL[:1],
        {"target_modules": ["k"], "layers_to_transform": [0, 1], "layers_pattern": ["h"]},
        None,
    ),
    "all-linear": (ALL[1:], {"target_modules": "all-linear"}, "layers.0.q"),
    "all-linear, all there": (ALL, {"target_modules": "ALL-linear"}, None),
    "ranks and alphas": (
        ALL[:5],
        {"target_modules": ALL, "rank_pattern": {"2.k": 9}, "alpha_pattern": {"2.k": 3}},
        "layers.2.k",
    ),
    "nothing said": (ALL[:1], {"target_modules": None}, None),
}


@pytest.mark.parametrize("into", ["plain linears", "LoRALinears"])
@pytest.mark.parametrize(("have", "fields", "missing"), CHOICES.values(), ids=CHOICES)
def test_half_a_file_is_named(have, fields, missing, into, tmp_path):
    save(adapt(Stack(), {path: {} for path in have}), tmp_path, **fields)
    model = Stack()
    if into == "LoRALinears":
        adapt(model, {path: {} for path in have})
    before = snapshot(model)
    if missing is None:
        lk.load_adapter(model, tmp_path)
        found = {path for path, m in model.named_modules() if isinstance(m, lk.LoRALinear)}
        assert found == set(have)
        return
    # A convolution or embedding in the way is one that PEFT would have adapted.
    with pytest.raises(
        ValueError, match=f"expected weights of layer '{re.escape(missing)}', which"
    ):
        lk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_layers_are_chosen_as_peft_does():
    """Random fields over random paths, against PEFT's own function."""
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    peft, draw = pytest.importorskip("peft"), random.Random(torch.initial_seed())
    old = peft.__version__.startswith(("0.18.", "0.19.", "0.20."))
    names = ["q", "k", "layers", "h", "0", "1", "12", "up_q", "mlp"]
    chosen = 0
    for _ in range(3000):
        path = ".".join(draw.choices(names, k=draw.randint(1, 5)))
        wanted = [".".join(draw.choices(names, k=draw.randint(1, 2))) for _ in range(2)]
        if draw.random() < 0.2:
            wanted = [*wanted, path]
        fields = {
            "target_modules": draw.choice([wanted, "|".join(wanted), r".*\.(q|0)", r"h.*"]),
            "exclude_modules": draw.choice([None, None, None, [], ["mlp.q"], r".*\.12\..*"]),
            "layers_to_transform": None,
        }
        if not isinstance(fields["target_modules"], str):
            fields["layers_to_transform"] = draw.choice([None, None, 12, 1, [1, 12], [0], []])
            if fields["layers_to_transform"] not in (None, []):
                fields["layers_pattern"] = draw.choice([None, "layers", ["h", "layers"], []])
        # Until 0.20 PEFT took the last number of a path for the layer's, and a pattern where
        # something stands before it.
        first, *others = path.split(".")
        numbers = [part for part in (first, *others) if part.isdigit()]
        if fields["layers_to_transform"] is not None and (
            len(numbers) > 1 or (old and first in ("layers", "h"))
        ):
            continue
        theirs = tuners.check_target_module_exists(peft.LoraConfig(**fields), path)
        ours = targets(fields, path, nn.Linear(1, 1), nn.Identity())
        assert ours == bool(theirs), (fields, path)
        chosen += ours
    assert 200 < chosen < 2000


BAD_FIELDS = {
    "target_modules": [5, {"q": 1}, ["q", 5], "(", "*q"],
    "exclude_modules": [5, [None], "["],
    "layers_to_transform": ["0", [0.5], {"a": 1}],
    "layers_pattern": [5, [5], "(", ["("]],
    "rank_pattern": [["q"], {"(": 2}, "q", 5],
    "alpha_pattern": [["q"], {"*": 2}],
}


@pytest.mark.parametrize(
    ("field", "value"), [(k, v) for k, values in BAD_FIELDS.items() for v in values]
)
def test_a_bad_pattern_is_named(field, value, tmp_path):
    save(adapt(Net(), {"q": {}, "z.k": {}}), tmp_path, **{field: value})
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{re.escape(CONFIG)}: {field}: expected"):
        lk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_fan_in_fan_out_is_no_setting_of_a_linear(tmp_path):
    saved, model = adapt(Net(), {"q": {}}), Net()
    save(saved, tmp_path, fan_in_fan_out=True)  # PEFT sets it to False
    lk.load_adapter(model, tmp_path)
    assert torch.equal(model.q.lora_A.weight, saved.q.lora_A.weight)


@pytest.mark.parametrize("into", ["plain linears", "LoRALinears"])
def test_layers_on_meta_get_an_adapter_with_values(into, tmp_path):
    saved = adapt(Net(), {"q": {}, "z.k": {}, "z.q": {}}, bias="lora_only", lora_dropout=0.1)
    lk.save_adapter(saved, tmp_path)
    model = Net()
    if into == "LoRALinears":
        adapt(model, {"q": {}, "z.k": {}, "z.q": {}})
    model.to("meta")
    lk.load_adapter(model, tmp_path)
    for path in ("q", "z.k", "z.q"):
        ours, theirs = model.get_submodule(path), saved.get_submodule(path)
        assert ours.lora_dropout == 0.1
        assert ours.base_layer.weight.is_meta
        for name in ("lora_A.weight", "lora_B.weight"):
            assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name))
            assert ours.get_parameter(name).requires_grad
        if theirs.base_layer.bias is not None:
            assert torch.equal(ours.base_layer.bias, theirs.base_layer.bias)
            assert ours.base_layer.bias.requires_grad
    base = {k: v for k, v in saved.state_dict().items() if "lora_" not in k}
    model.load_state_dict(base, strict=False, assign=True)
    x = torch.randn(5, 8)
    torch.testing.assert_close(model.eval()(x), saved.eval()(x))


def test_layers_on_meta_are_as_before_after_a_failure(tmp_path, monkeypatch):
    lk.save_adapter(adapt(Net(), {"q": {}, "z.k": {}}, bias="all"), tmp_path)
    model = adapt(Net(), {"q": {}, "z.k": {}}).to("meta")
    before, parameters = repr(model), list(model.parameters())

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(model.zok, "_parameters", OneRefusing(model.zok._parameters, fail))
    with pytest.raises(torch.OutOfMemoryError):
        lk.load_adapter(model, tmp_path)
    assert repr(model) == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


class OneRefusing(dict):
    """A module's parameters of which none can be set any more."""

    def __init__(self, parameters, fail):
        super().__init__(parameters)
        self.fail = fail

    def __setitem__(self, name, value):
        if value is not self[name]:
            self.fail()


def test_no_values_are_not_saved(tmp_path):
    model = adapt(Net(), {"q": {}}).to("meta")
    with pytest.raises(ValueError, match=r"q\.lora_A\.weight: expected values .* on the meta"):
        lk.save_adapter(model, tmp_path / "new")
    model = adapt(Net(), {"q": {}})
    model.q.lora_B.weight.data = torch.empty(0)  # as somebody else's shard
    with pytest.raises(ValueError, match=r"lora_B.weight: expected values of shape \[12, 2\], got"):
        lk.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("into", ["plain linears", "LoRALinears"])
def test_offloaded_layers_are_refused(into, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    saved = adapt(Net(), {"q": {}})
    lk.save_adapter(saved, tmp_path)
    model = Net() if into == "plain linears" else adapt(Net(), {"q": {}})
    accelerate.cpu_offload(model, torch.device("cpu"))
    before = repr(model)
    with pytest.raises(ValueError, match=r"q.*: expected values, got a layer that accelerate off"):
        lk.load_adapter(model, tmp_path)
    assert repr(model) == before
    if into == "plain linears":
        return  # accelerate leaves a forward on the instance, which from_linear refuses
    with pytest.raises(ValueError, match="on the meta device"):
        lk.save_adapter(model, tmp_path / "new")
    accelerate.hooks.remove_hook_from_submodules(model)
    lk.load_adapter(model, tmp_path)
    assert torch.equal(model.q.lora_B.weight, saved.q.lora_B.weight)


def test_models_of_peft_have_methods_of_their_own(tmp_path):
    peft = pytest.importorskip("peft")
    lk.save_adapter(adapt(Net(), {"q": {}}), tmp_path)
    config = peft.LoraConfig(target_modules=["q"])
    model = peft.get_peft_model(Net(), config)
    injected = peft.inject_adapter_in_model(config, Net())
    for theirs in (model, model.base_model, nn.DataParallel(model), injected):
        with pytest.raises(ValueError, match=r"got PEFT's in .* \(use model\.save_pretrained\)"):
            lk.save_adapter(theirs, tmp_path / "new")
        with pytest.raises(ValueError, match=r"got PEFT's in .* \(use model\.load_adapter\)"):
            lk.load_adapter(theirs, tmp_path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("paths", [["q"], ["q", "z.q", "z.k"], ["z.k", "zok"]])
def test_every_file_is_read_back(dtype, adapter_dtype, bias, paths, tmp_path):
    peft = pytest.importorskip("peft")
    own = {path: {"r": 1 + i, "lora_alpha": 2 * i + 1} for i, path in enumerate(paths)}
    fresh = Net().to(dtype)
    saved = adapt(
        copy.deepcopy(fresh),
        own,
        bias=bias,
        use_rslora=len(paths) == 2,
        adapter_dtype=adapter_dtype,
    )
    lk.save_adapter(saved, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)
    lk.load_adapter(fresh, tmp_path)
    for path in paths:
        ours, layer = saved.get_submodule(path), theirs.base_model.model.get_submodule(path)
        again = fresh.get_submodule(path)
        assert again.scaling == ours.scaling == layer.scaling["default"]
        for name in ("lora_A", "lora_B"):
            value = getattr(ours, name).weight
            assert torch.equal(getattr(again, name).weight, value)
            assert getattr(again, name).weight.dtype == value.dtype
            assert torch.equal(getattr(layer, name)["default"].weight.to(value.dtype), value)
        if bias != "none" and ours.base_layer.bias is not None:
            assert torch.equal(again.base_layer.bias, ours.base_layer.bias)
            assert torch.equal(layer.base_layer.bias, ours.base_layer.bias)

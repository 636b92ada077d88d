"""Adapter files of embeddings and convolutions: PEFT's layout both ways, beside linear layers."""

import json
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_kernels as lk
from tests.support.adapters import CONFIG, PREFIX, WEIGHTS, assert_unchanged, snapshot
from tests.support.closeness import assert_close

F64 = torch.float64


class Mixed(nn.Module):
    """Each kind of layer once, all but `head` adapted in the tests."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6, padding_idx=4)
        self.conv1 = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(2, 4, (1, 3), padding="same", groups=2)
        self.conv3 = nn.Conv3d(4, 4, 1)
        self.q = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)
        self.double().eval()

    def forward(self, ids):
        h = self.conv1(self.embed_tokens(ids).mT).mT  # [2, 6, 8]
        h = self.conv2(h.unflatten(-1, (2, 4)).permute(0, 2, 1, 3))
        return self.head(self.q(self.conv3(h[..., None])[..., 0].mT.mT))


NAMES = ["embed_tokens", "conv1", "conv2", "conv3", "q"]
IDS = torch.arange(22).reshape(2, 11) % 11


def adapted(**settings):
    """A Mixed with an adapter of random values in each layer but the head."""
    model = Mixed()
    kinds = {nn.Conv1d: lk.LoRAConv1d, nn.Conv2d: lk.LoRAConv2d, nn.Conv3d: lk.LoRAConv3d}
    shared = {"r": 2, "lora_alpha": 6, "use_rslora": settings.get("use_rslora", False)}
    for name in NAMES:
        base = getattr(model, name)
        if isinstance(base, nn.Embedding):
            layer = lk.LoRAEmbedding.from_embedding(base, **shared)
        elif isinstance(base, nn.Linear):
            layer = lk.LoRALinear.from_linear(base, **shared | settings)
        else:
            layer = kinds[type(base)].from_conv(base, **shared | settings)
        setattr(model, name, layer)
    for key, parameter in model.named_parameters():
        if "lora_" in key or parameter.requires_grad:
            nn.init.normal_(parameter)
    return model.eval()


def theirs(model, directory=None, **settings):
    """PEFT's model of the plain layers, with random adapters, or with a file's."""
    peft = pytest.importorskip("peft")
    if directory is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as on keys that are missing
            warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")
            return peft.PeftModel.from_pretrained(model, directory).eval()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=NAMES, **settings)
    found = peft.get_peft_model(model, config, autocast_adapter_dtype=False).double().eval()
    for parameter in found.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return found


CASES = {"plain": {}, "rslora and dropout": {"use_rslora": True, "lora_dropout": 0.3}}
CASES["bias"] = {"bias": "lora_only"}
each = pytest.mark.parametrize("settings", CASES.values(), ids=CASES)


@each
def test_peft_loads_what_we_save(settings, tmp_path):
    model = adapted(**settings)
    lk.save_adapter(model, tmp_path)
    if settings.get("bias"):
        pytest.importorskip("peft", minversion="0.21")
    plain = Mixed()
    plain.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k}
    )
    assert_close(theirs(plain, tmp_path)(IDS), model(IDS), 1e-12)


@each
@pytest.mark.parametrize("into", ["plain", "adapted"])
@pytest.mark.filterwarnings("ignore")
def test_we_load_what_peft_saves(settings, into, tmp_path):
    if settings.get("bias"):
        pytest.importorskip("peft", minversion="0.21")
    model = theirs(Mixed(), **settings)
    model.save_pretrained(tmp_path)
    other = Mixed() if into == "plain" else adapted()
    bases = model.base_model.model.state_dict()
    for key in other.state_dict():
        if "lora_" not in key:
            named = key if key in bases else key.replace(".", ".base_layer.", 1)
            other.state_dict()[key].copy_(bases[named])
    lk.load_adapter(other, tmp_path)
    assert_close(other(IDS), model(IDS), 1e-12)
    assert other.conv2.use_rslora == settings.get("use_rslora", False)
    assert other.conv1.lora_dropout == settings.get("lora_dropout", 0.0)
    lk.save_adapter(other, tmp_path / "again")
    first, again = (
        safetensors.torch.load_file(d / WEIGHTS) for d in (tmp_path, tmp_path / "again")
    )
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.parametrize("into", ["plain", "adapted"])
def test_a_base_weight_in_the_file_is_loaded(into, tmp_path):
    """PEFT adds that of an adapted embed_tokens."""
    lk.save_adapter(adapted(), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    weight = torch.randn(11, 6, dtype=F64)
    tensors[f"{PREFIX}embed_tokens.base_layer.weight"] = weight
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    model = Mixed() if into == "plain" else adapted()
    lk.load_adapter(model, tmp_path)
    assert torch.equal(model.embed_tokens.base_layer.weight, weight)


def retarget(**fields):
    return lambda config, tensors: config.update(fields)


def rename(old, new):
    return lambda config, tensors: tensors.update({PREFIX + new: tensors.pop(PREFIX + old)})


def add(key, *shape):
    return lambda config, tensors: tensors.update({PREFIX + key: torch.ones(shape, dtype=F64)})


SPOILERS = {
    "an A of a linear layer": (
        rename("embed_tokens.lora_embedding_A", "embed_tokens.lora_A.weight"),
        "expected 'embed_tokens.lora_embedding_A', got none",
    ),
    "both": (add("embed_tokens.lora_A.weight", 2, 6), "beside lora_embedding_A, got one"),
    "kernel": (add("conv1.lora_A.weight", 2, 6, 1), r"conv1\.lora_A: .*\[2, 6, 3\], got"),
    "groups": (add("conv2.lora_B.weight", 4, 2, 1, 1), r"conv2\.lora_B: .*\[4, 1, 1, 1\], got"),
    "rank beside groups": (retarget(rank_pattern={"conv2": 3}), "conv2: r: expected a multiple|3,"),
    "base weight of a plain layer": (add("head.base_layer.weight", 3, 6), "adapted layers alone"),
    "base weight of another shape": (
        add("embed_tokens.base_layer.weight", 12, 6),
        r"expected shape \[11, 6\], got \[12, 6\]",
    ),
    "DoRA": (retarget(use_dora=True), "expected 'conv1.lora_magnitude_vector', got none"),
}


@pytest.mark.parametrize("into", ["plain", "adapted"])
@pytest.mark.parametrize(("spoil", "message"), SPOILERS.values(), ids=SPOILERS)
def test_a_bad_file_changes_nothing(spoil, message, into, tmp_path):
    lk.save_adapter(adapted(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    spoil(config, tensors)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    model = Mixed() if into == "plain" else adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_dora_of_one_layer_alone_is_not_saved(tmp_path):
    model = adapted()
    model.q = lk.LoRALinear(4, 6, r=2, use_dora=True)
    with pytest.raises(ValueError, match="use_dora: expected one value for all layers"):
        lk.save_adapter(model, tmp_path)


def test_a_failure_while_loading_takes_everything_back(tmp_path, monkeypatch):
    lk.save_adapter(adapted(), tmp_path)
    model = Mixed()
    before = snapshot(model)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(lk.LoRALinear, "reset_lora_parameters", fail)
    with pytest.raises(KeyboardInterrupt):
        lk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)

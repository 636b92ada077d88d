"""Adapter files of experts: PEFT's layout both ways, and what is refused."""

import json
import warnings

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import lora_kernels as lk
from tests.support.adapters import CONFIG, PREFIX, WEIGHTS, assert_unchanged, snapshot

peft = pytest.importorskip("peft")

E, H, I = 3, 12, 8  # noqa: E741  experts, hidden and inner size
GATE = torch.arange(10).reshape(5, 2) % E


class Model(nn.Module):
    """A layer and experts; those of gpt-oss are stored as [E, K, N]."""

    def __init__(self, transposed=False, inner=I):
        super().__init__()
        kind, config = (
            (GptOssExperts, transformers.GptOssConfig)
            if transposed
            else (MixtralExperts, transformers.MixtralConfig)
        )
        made = config(hidden_size=H, intermediate_size=inner, num_local_experts=E)
        made._experts_implementation = "eager"
        self.q = nn.Linear(H, H)
        self.mlp = nn.ModuleDict({"experts": kind(made)})
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)
        self.double()

    def forward(self, x):
        gates = torch.full(GATE.shape, 0.5, dtype=x.dtype)
        return self.mlp["experts"](self.q(x), GATE, gates)


X = torch.linspace(-1, 1, 5 * H, dtype=torch.float64).reshape(5, H)


def adapted(model, names=None, **settings):
    layer = lk.LoRAExperts.from_experts(
        model.mlp["experts"], target_parameters=names, **{"r": 2, "lora_alpha": 6} | settings
    )
    model.mlp["experts"] = layer
    model.q = lk.LoRALinear.from_linear(model.q, r=4)
    randomise(model)
    return model


def randomise(model):
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)


def theirs(model, names=("gate_up_proj", "down_proj"), modules=("q",), **settings):
    targets = [f"mlp.experts.{name}" for name in names]
    config = peft.LoraConfig(
        target_modules=list(modules), target_parameters=targets,
        **{"r": 2, "lora_alpha": 6} | settings,
    )  # fmt: skip
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    randomise(model)
    return model


layouts = pytest.mark.parametrize("transposed", [False, True], ids=["[E, N, K]", "[E, K, N]"])
some = pytest.mark.parametrize("names", [["gate_up_proj", "down_proj"], ["down_proj"]], ids=len)


@some
@layouts
def test_peft_reads_what_is_written(tmp_path, transposed, names):
    plain = Model(transposed)
    state = {name: p.clone() for name, p in plain.state_dict().items()}
    model = adapted(plain, names)
    lk.save_adapter(model, tmp_path)
    other = Model(transposed)
    other.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as on keys that are missing
        # PEFT 0.21 looks for patterns among modules alone, and uses them for parameters, too.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match")
        read = peft.PeftModel.from_pretrained(other, tmp_path)
    torch.testing.assert_close(read(X), model(X))


@some
@layouts
def test_what_peft_writes_is_read(tmp_path, transposed, names):
    plain = Model(transposed)
    state = {name: p.clone() for name, p in plain.state_dict().items()}
    model = theirs(plain, names)
    model.save_pretrained(tmp_path)
    wrapped, filled = Model(transposed), Model(transposed)
    for each in (wrapped, filled):
        each.load_state_dict(state)
    filled.mlp["experts"] = lk.LoRAExperts(filled.mlp["experts"], r=2, target_parameters=names)
    for each in (wrapped, filled):
        lk.load_adapter(each, tmp_path)
        assert list(each.mlp["experts"].lora_A) == names
        torch.testing.assert_close(each(X), model(X))


def test_a_file_of_experts_alone_and_its_settings(tmp_path):
    model = Model()
    layer = lk.LoRAExperts(model.mlp["experts"], r=2, lora_alpha=3, use_rslora=True)
    model.mlp["experts"] = layer
    lk.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == []
    names = ("gate_up_proj", "down_proj")
    assert config["target_parameters"] == [f"mlp.experts.{name}" for name in names]
    read = Model()
    lk.load_adapter(read, tmp_path)
    assert read.mlp["experts"].scaling == layer.scaling
    assert isinstance(read.q, nn.Linear)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_ranks_of_one_module_and_of_two(tmp_path):
    """PEFT has a rank of each parameter, a module here has one; a linear layer has its own."""
    model = theirs(Model(), rank_pattern={r"experts\.\w+": 3}, alpha_pattern={"experts.*": 5})
    model.save_pretrained(tmp_path)
    read = Model()
    lk.load_adapter(read, tmp_path)
    assert (read.q.r, read.mlp["experts"].r, read.mlp["experts"].lora_alpha) == (2, 3, 5)
    lk.save_adapter(read, tmp_path / "again")
    peft.PeftModel.from_pretrained(Model(), tmp_path / "again")

    model = theirs(Model(), rank_pattern={"experts.down_proj": 3})
    model.save_pretrained(tmp_path)
    read = Model()
    before = snapshot(read)
    with pytest.raises(ValueError, match=r"expected one value for mlp.experts.gate_up_proj"):
        lk.load_adapter(read, tmp_path)
    assert_unchanged(read, before)


def rewrite(directory, change):
    """Let a function change what the two files say."""
    config = json.loads((directory / CONFIG).read_text())
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    change(config, tensors)
    (directory / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, directory / WEIGHTS)


PATH = f"{PREFIX}mlp.experts."


def old(config, tensors):
    config["peft_version"] = "0.18.1"


def unsaid(config, tensors):
    config["peft_version"] = None


def swapped(config, tensors):
    for inner in ("", "base_layer."):
        a, b = (f"{PATH}{inner}lora_{factor}.weight" for factor in "AB")
        tensors[a], tensors[b] = tensors[b].T.contiguous(), tensors[a].T.contiguous()


def without(config, tensors):
    for key in [key for key in tensors if key.startswith(PATH)]:
        del tensors[key]


def half(config, tensors):
    del tensors[f"{PATH}base_layer.lora_B.weight"]


def untargeted(config, tensors):
    config["target_parameters"] = ["mlp.experts.down_proj"]


def mistyped(config, tensors):
    config["target_parameters"] = "experts"


REFUSED = {
    "of PEFT 0.18": (old, "peft_version: expected 0.19.1 .* square weights .* got 0.18.1"),
    "of an unknown PEFT": (unsaid, "peft_version: expected 0.19.1 .* square weights"),
    "another orientation": (swapped, r"experts.lora_A: expected .* \[6, 8\], got .* \[6, 12\]"),
    "without the experts": (without, "expected weights of layer 'mlp.experts'"),
    "half of a pair": (half, r"expected 'mlp.experts.base_layer.lora_B.weight', got none"),
    "another parameter": (untargeted, "expected lora_A.weight, lora_B.weight by MixtralExperts"),
    "no list": (mistyped, "target_parameters: expected strings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(tmp_path, case):
    change, message = REFUSED[case]
    inner = H if change in (old, unsaid) else I  # whose down_proj is square
    lk.save_adapter(adapted(Model(inner=inner)), tmp_path)
    rewrite(tmp_path, change)
    model = Model(inner=inner)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_an_old_file_is_read_where_its_shapes_say_how(tmp_path):
    lk.save_adapter(adapted(Model()), tmp_path)
    rewrite(tmp_path, old)
    lk.load_adapter(Model(), tmp_path)


def test_experts_that_a_path_would_name_too_are_not_left_out(tmp_path):
    """PEFT takes target_parameters for the end of a path."""
    model = nn.Module()
    model.mlp, model.other = Model().mlp, nn.ModuleDict({"mlp": Model().mlp})
    model.mlp["experts"] = lk.LoRAExperts(model.mlp["experts"], r=2)
    with pytest.raises(ValueError, match=r"expected 'other.mlp.experts' adapted, too"):
        lk.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())

"""patch_peft: what it changes, what it leaves and why, and that the model stays PEFT's in all else."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
import lora_kernels._peft_layer as peft_layer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PATHS = ["base_model.model.up", "base_model.model.down"]


class Net(nn.Module):
    """Two linears to adapt, and room for layers of other types."""

    def __init__(self, bias=True):
        super().__init__()
        self.up, self.down = nn.Linear(24, 32, bias=bias), nn.Linear(32, 24, bias=bias)
        self.conv, self.embedding = nn.Conv1d(24, 24, 1), nn.Embedding(8, 24)

    def forward(self, x):
        x = x + self.embedding.weight[0]
        return self.down(self.up(x).tanh()) + self.conv(x.transpose(-1, -2)).transpose(-1, -2)


def randomize(model):
    """Give every adapter parameter a random value: as PEFT draws them, lora_B is zero."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def make_model(*, base=None, bias=True, **config):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], **config}
    return randomize(peft.get_peft_model(base or Net(bias), peft.LoraConfig(**settings)))


def make_x(dtype=torch.float32):
    return torch.randn(3, 5, 24).to(dtype)


def make_llama(**config):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    dtype = config.pop("dtype", torch.float32)
    return make_model(base=base.to(dtype), target_modules="all-linear", **config)


def up(model):
    return model.base_model.model.up


@pytest.fixture
def fused(monkeypatch):
    """A list that grows by the keyword arguments of every fused call."""
    calls = []

    def counting(*args, **kwargs):
        calls.append(kwargs)
        return lk.lora_linear(*args, **kwargs)

    monkeypatch.setattr(peft_layer, "lora_linear", counting)
    return calls


def state_of(model):
    """The class and every attribute of every module, dictionaries by their items."""
    return [
        (
            path,
            type(module),
            {
                key: (id(value), [(k, id(v)) for k, v in value.items()])
                if isinstance(value, dict)
                else id(value)
                for key, value in vars(module).items()
            },
        )
        for path, module in model.named_modules()
    ]


def test_patched_model_computes_what_peft_computes(fused):
    model, x = make_model(lora_alpha=3, use_rslora=True), make_x().requires_grad_()
    plain = copy.deepcopy(model)
    report = lk.patch_peft(model)
    assert report == lk.PatchReport(patched=PATHS, left={})
    torch.testing.assert_close(model(x), plain(x))
    assert [call["scaling"] for call in fused] == [1.5, 1.5]
    gradients = [torch.autograd.grad(m(x).square().sum(), x) for m in (model, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    single = up(make_model())
    assert lk.patch_peft(single).patched == [""]


def test_report_is_readable():
    model = make_model(target_modules=["up", "down", "conv", "embedding"])
    up(model).lora_A.register_forward_hook(lambda *args: None)  # on the container: never called
    up(model).base_layer.register_forward_hook(lambda *args: None)
    assert str(lk.patch_peft(model)).splitlines() == [
        "lora_kernels: 1 LoRA layers patched, 3 left",
        "  left (hooks on base layer): base_model.model.up",
        "  left (lora.layer.Conv1d has no fused forward): base_model.model.conv",
        "  left (lora.layer.Embedding has no fused forward): base_model.model.embedding",
    ]


def several_active(model):
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up", "down"]))
    randomize(model).base_model.set_adapter(["default", "second"])


def none_active(model):
    up(model).set_adapter([])


def hook_by_accelerate(model):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(up(model).base_layer, hooks.ModelHook())


def replace_forward(model):
    up(model).forward = lambda x: torch.ones(*x.shape[:-1], 32)


def other_type(module):
    """Make a module an instance of a subclass with another forward."""
    kind = type(module)
    forward = lambda self, x: 2 * kind.forward(self, x)  # noqa: E731
    module.__class__ = type("Doubled", (kind,), {"forward": forward})


STATES = {
    "DoRA": ({"use_dora": True}, lambda model: None, "LoRA variant DoraLinearVariant"),
    "several": ({}, several_active, "2 active adapters, one is fused"),
    "none active": ({}, none_active, "no active adapter"),
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), "adapters disabled"),
    "merged": ({}, lambda model: model.merge_adapter(), "merged: default"),
    "replaced": ({}, replace_forward, "its forward was replaced on the instance"),
    "accelerate": ({}, hook_by_accelerate, "hooks on base layer"),
    "hook on A": (
        {},
        lambda m: up(m).lora_A["default"].register_forward_pre_hook(lambda mod, x: (2 * x[0],)),
        "hooks on lora_A",
    ),
    "hook on dropout": (
        {},
        lambda m: up(m).lora_dropout["default"].register_forward_hook(lambda mod, x, y: -y),
        "hooks on dropout",
    ),
    "base type": (
        {},
        lambda model: other_type(up(model).base_layer),
        "base layer is Doubled, not torch.nn.Linear",
    ),
    "B type": (
        {},
        lambda model: other_type(up(model).lora_B["default"]),
        "lora_B is Doubled, not torch.nn.Linear",
    ),
    "layer type": (
        {},
        lambda model: other_type(up(model)),
        "test_peft.Doubled has no fused forward",
    ),
}


@pytest.mark.parametrize("when", ["before patching", "after patching"])
@pytest.mark.parametrize(("config", "change", "reason"), STATES.values(), ids=STATES)
def test_a_layer_is_left_to_peft_where_it_must_be(config, change, reason, when, fused):
    model, x = make_model(**config), make_x()
    plain = copy.deepcopy(model)
    if when == "after patching":
        lk.patch_peft(model)
    for m in (plain, model):
        torch.manual_seed(0)
        change(m)
    if when == "before patching":
        report = lk.patch_peft(model)
        assert report.left[PATHS[0]] == reason
    torch.testing.assert_close(up(model)(x), up(plain)(x), rtol=0, atol=0)
    assert not fused


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_patching_again_renews_and_unpatching_restores(impl, fused):
    model, x = make_model(), make_x()
    hook_calls = []
    up(model).register_forward_hook(lambda *args: hook_calls.append(args))
    before, expected = state_of(model), model(x)
    assert lk.unpatch_peft(model) == 0
    assert lk.patch_peft(model, impl="eager") == lk.patch_peft(model, impl=impl)
    assert type(up(model)) is peft_layer.FusedLinear
    torch.testing.assert_close(model(x), expected)
    assert [call["impl"] for call in fused] == [impl, impl]
    changed = [
        (old[0], old[2]) for old, new in zip(before, state_of(model), strict=True) if old != new
    ]
    assert [path for path, _ in changed] == PATHS
    for path, attributes in changed:
        now = vars(model.get_submodule(path))
        assert now.keys() - attributes.keys() == {"_lora_kernels_impl"}
    assert lk.unpatch_peft(model) == 2
    assert state_of(model) == before
    assert torch.equal(model(x), expected)
    assert len(fused) == 2
    assert len(hook_calls) == 3


@pytest.mark.parametrize("patched_before", [False, True])
def test_a_failure_halfway_leaves_the_model_as_it_was(patched_before, monkeypatch):
    model = make_model()
    if patched_before:
        lk.patch_peft(model, impl="eager")
    before, calls = state_of(model), []

    def left_reason(layer):
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(peft_layer, "left_reason", left_reason)
    with pytest.raises(KeyboardInterrupt):
        lk.patch_peft(model, impl="reference")
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("model", "impl", "error", "message"),
    [
        (make_model(), "cuda", ValueError, "impl: expected one of .*'cuda'"),
        (Net(), "auto", ValueError, "model: expected a model with PEFT LoRA layers, got none"),
        (lambda x: x, "auto", TypeError, "model: expected a torch.nn.Module, got function"),
    ],
)
def test_bad_arguments(model, impl, error, message):
    before = state_of(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        lk.patch_peft(model, impl=impl)
    assert before is None or state_of(model) == before


def test_each_call_decides(fused):
    model, x = make_model(), make_x()
    plain = copy.deepcopy(model)
    lk.patch_peft(model)

    def check(fused_calls):
        fused.clear()
        torch.testing.assert_close(model(x), plain(x))
        assert len(fused) == fused_calls

    def both(change):
        for m in (model, plain):
            torch.manual_seed(5)
            change(m)

    check(2)
    both(several_active)
    check(0)
    both(lambda m: m.set_adapter("second"))
    check(2)
    both(lambda m: m.base_model.disable_adapter_layers())
    check(0)
    both(lambda m: m.base_model.enable_adapter_layers())
    check(2)
    both(lambda m: m.merge_adapter())
    check(0)
    both(lambda m: m.unmerge_adapter())
    check(2)
    both(lambda m: m.delete_adapter("second"))
    both(lambda m: m.set_adapter("default"))
    check(2)
    with model.disable_adapter(), plain.disable_adapter():
        check(0)
    # A tensor scaling is what PEFT's hot swapping makes of the numbers.
    both(peft.utils.hotswap._convert_scalings_to_tensor)
    both(lambda m: up(m).scaling["default"].fill_(0.25))
    check(2)
    model.eval()
    names = ["default", "__base__", "default"]
    fused.clear()
    torch.testing.assert_close(
        model(x, adapter_names=names), plain.eval()(x, adapter_names=names), rtol=0, atol=0
    )
    assert not fused


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.merge_and_unload(),
        lambda m: m.unload(),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.double(),
    ],
    ids=["merge_and_unload", "unload", "deepcopy", "pickle", "double"],
)
def test_what_peft_makes_of_a_patched_model(change):
    model = make_model()
    plain = copy.deepcopy(model)
    lk.patch_peft(model)
    model, plain = change(model), change(plain)
    x = make_x(model.get_parameter(next(iter(model.state_dict()))).dtype)
    torch.testing.assert_close(model(x), plain(x))
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_saved_files_are_those_of_the_unpatched_model(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "plain")
    lk.patch_peft(model)
    model.save_pretrained(tmp_path / "patched")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "patched" / name).read_bytes() == (
            tmp_path / "plain" / name
        ).read_bytes()

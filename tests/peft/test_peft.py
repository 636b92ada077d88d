"""patch_peft: what it fuses, what it leaves and why; in all else the model stays PEFT's."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
import lora_kernels._peft.linear as peft_layer
from tests.support.closeness import assert_close

hooks = pytest.importorskip("accelerate.hooks")
peft = pytest.importorskip("peft")
hotswap = pytest.importorskip("peft.utils.hotswap")
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


def make_x(dtype=None):
    return torch.randn(3, 5, 24, dtype=dtype)


def make_llama(dtype=torch.float32, **config):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    # Larger weights than by default: AdamW would make large steps of gradients near its epsilon.
    llama_config = transformers.LlamaConfig(**sizes, **heads, initializer_range=0.1)
    base = transformers.LlamaForCausalLM(llama_config).to(dtype)
    return make_model(base=base, target_modules="all-linear", **config)


def up(model):
    return model.base_model.model.up


@pytest.fixture
def fused(monkeypatch):
    """A list that grows by the arguments of every fused call."""
    calls, real = [], peft_layer.run

    def counting(*args, **kwargs):
        calls.append(inspect.signature(real).bind(*args, **kwargs).arguments)
        return real(*args, **kwargs)

    monkeypatch.setattr(peft_layer, "run", counting)
    return calls


def state_of(model):
    """The class and every attribute of every module, dictionaries by their items."""

    def identity(value):
        items = value.items() if isinstance(value, dict) else ()
        return id(value), tuple((key, id(item)) for key, item in items)

    return [
        (path, type(module), {key: identity(value) for key, value in vars(module).items()})
        for path, module in model.named_modules()
    ]


def test_patched_model_computes_what_peft_computes(fused):
    model, x = make_model(lora_alpha=3, use_rslora=True), make_x().requires_grad_()
    plain = copy.deepcopy(model)
    assert lk.patch_peft(model) == lk.PatchReport(patched=PATHS, left={})
    assert_close(model(x), plain(x))
    assert [call["call"].adapter.scaling for call in fused] == [1.5, 1.5]
    assert_close(*(torch.autograd.grad(m(x).square().sum(), x)[0] for m in (model, plain)))
    assert lk.patch_peft(up(make_model())).patched == [""]


def test_report_is_readable():
    model = make_model(target_modules=["up", "down", "conv", "embedding"])
    up(model).base_layer.register_forward_hook(lambda *args: None)
    assert str(lk.patch_peft(model, impl="eager")).splitlines() == [
        "lora_kernels: 3 LoRA layers patched, 1 left; run by eager",
        "  left (base layer has hooks): base_model.model.up",
    ]


def add_second(model, **config):
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up", "down"], **config))
    randomize(model).set_adapter("second")


def activate_both(model, **config):
    add_second(model, **config)
    model.base_model.set_adapter(["default", "second"])


def replace_forward(model):
    up(model).forward = lambda x: torch.ones(*x.shape[:-1], 32)


def double(module):
    """Make a module an instance of a subclass with another forward."""
    kind = type(module)
    module.__class__ = type("Doubled", (kind,), {"forward": lambda *args: 2 * kind.forward(*args)})


def double_by_hook(adapters):
    adapters["default"].register_forward_hook(lambda module, args, y: 2 * y)


ALORA = "LoRA variant ALoraLinearVariant: aLoRA adapts the tokens after its invocation"
# Why `up` keeps PEFT's forward, and what brings it there.
STATES = {
    ALORA: lambda model: add_second(model, alora_invocation_tokens=[1]),
    "2 active adapters: lora_B has a bias": lambda m: activate_both(m, lora_bias=True),
    "no active adapter": lambda model: up(model).set_adapter([]),
    "adapters disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged: default": lambda model: model.merge_adapter(),
    "its forward was replaced on the instance": replace_forward,
    "base layer has hooks": lambda m: hooks.add_hook_to_module(up(m).base_layer, hooks.ModelHook()),
    "scaling requires grad": lambda m: up(m).scaling.update(default=nn.Parameter(torch.ones(()))),
    "lora_A has hooks": lambda model: double_by_hook(up(model).lora_A),
    "dropout has hooks": lambda model: double_by_hook(up(model).lora_dropout),
    "base layer is Doubled, not torch.nn.Linear": lambda model: double(up(model).base_layer),
    "lora_B is Doubled, not torch.nn.Linear": lambda model: double(up(model).lora_B["default"]),
}

if peft.__version__.startswith("0.18."):  # a second adapter is no aLoRA there
    del STATES[ALORA]


@pytest.mark.parametrize("when", ["before patching", "after patching"])
@pytest.mark.parametrize(("reason", "change"), STATES.items(), ids=STATES)
def test_a_layer_is_left_to_peft_where_it_must_be(reason, change, when, fused):
    model, x = make_model(), make_x()
    plain = copy.deepcopy(model)
    if when == "after patching":
        lk.patch_peft(model)
    for m in (plain, model):
        torch.manual_seed(0)
        change(m)
    if when == "before patching":
        assert lk.patch_peft(model).left[PATHS[0]] == reason
    assert torch.equal(up(model)(x), up(plain)(x))
    assert not fused


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_patching_again_renews_and_unpatching_restores(impl, fused):
    model, x, hook_calls, lora = make_model(), make_x(), [], peft.tuners.lora
    up(model).register_forward_hook(lambda *args: hook_calls.append(args))
    before, expected = state_of(model), model(x)
    assert not lk.unpatch_peft(model)
    assert lk.patch_peft(model, impl="eager") == lk.patch_peft(model, impl=impl)
    assert type(up(model)) is peft_layer.FusedLinear
    assert_close(model(x), expected)
    assert [call["impl"] for call in fused] == [impl, impl]
    for (path, kind, old), (_, _, new) in zip(before, state_of(model), strict=True):
        added = {lora.Linear: {"impl", "calls"}, lora.LoraModel: {"impl"}}.get(kind, ())
        assert new.keys() - old.keys() == {f"_lora_kernels_{name}" for name in added}, path
        assert old.items() <= new.items(), path
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


def test_bad_arguments():
    model = make_model()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"impl: expected one of .*'rocm'"):
        lk.patch_peft(model, impl="rocm")
    assert state_of(model) == before
    with pytest.raises(ValueError, match=r"model: expected .* PEFT LoRA layers, got none in Net"):
        lk.patch_peft(Net())
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        lk.patch_peft([model])


def test_each_call_decides(fused):
    model, x = make_model(), make_x()
    plain = copy.deepcopy(model)
    lk.patch_peft(model)

    def check(fused_calls, change=lambda m: None):
        for m in (model, plain):
            torch.manual_seed(5)
            change(m)
        fused.clear()
        assert_close(model(x), plain(x))
        assert len(fused) == fused_calls

    check(2)
    check(2, activate_both)
    check(2, lambda m: m.set_adapter("second"))
    check(0, lambda m: m.base_model.disable_adapter_layers())
    check(2, lambda m: m.base_model.enable_adapter_layers())
    check(0, lambda m: m.merge_adapter())
    check(2, lambda m: m.unmerge_adapter())
    check(2, lambda m: m.set_adapter("default"))
    check(2, lambda m: m.delete_adapter("second"))
    with model.disable_adapter(), plain.disable_adapter():
        check(0)
    # A tensor scaling is what PEFT's hot swapping makes of the numbers.
    check(2, hotswap._convert_scalings_to_tensor)
    check(2, lambda m: up(m).scaling["default"].fill_(0.25))
    fused.clear()
    mixed = {"adapter_names": ["default", "__base__", "default"]}
    assert torch.equal(model.eval()(x, **mixed), plain.eval()(x, **mixed))
    assert not fused


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_copies_stay_fused_and_unload_as_peft_does(method, fused):
    model, x = make_model(), make_x()
    plain = copy.deepcopy(model)
    lk.patch_peft(model)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert_close(model(x), plain(x))
    assert len(fused) == 2
    ours, theirs = (getattr(m, method)().state_dict() for m in (model, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_saved_files_are_those_of_the_unpatched_model(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "plain")
    lk.patch_peft(model)
    model.save_pretrained(tmp_path / "patched")
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "patched" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("config", [{}, {"lora_bias": True, "bias": "lora_only"}], ids=repr)
@pytest.mark.parametrize("bias", [True, False], ids=["base bias", "no base bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_gradients_are_those_of_peft(dtype, bias, config, fused):
    model = make_model(base=Net(bias).to(dtype), **config)
    plain = copy.deepcopy(model)
    lk.patch_peft(model)
    x, tolerance = make_x(dtype), 1e-5 if dtype == torch.float32 else 0.05
    assert_close(model(x), plain(x), tolerance)
    for m in (model, plain):
        m(x).float().square().mean().backward()
    assert len(fused) == 4
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            assert_close(ours.grad, theirs.grad, tolerance)


def test_a_meta_tensor_is_left_to_peft(fused):
    model, x = make_model().to("meta"), make_x().to("meta")
    assert lk.patch_peft(model).patched == PATHS
    assert model(x).shape == (3, 5, 24)
    assert not fused


def test_a_wrapper_made_while_patched_outlives_unpatching(fused):
    model, x = make_model(), make_x()
    expected = model(x)
    lk.patch_peft(model)
    up(model).forward = up(model).forward  # what accelerate's hooks keep
    lk.unpatch_peft(model)
    assert torch.equal(model(x), expected)
    assert not fused


def losses_of(model, autocast, patch):
    """The losses of 20 steps; the optimizer is made before the model is patched."""
    # Its own epsilon makes large steps of tiny gradients: one of 60 draws parted by 1e-3, not 1e-5.
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-6)
    assert not patch or len(lk.patch_peft(model).patched) == 14
    tokens, losses = torch.arange(48).reshape(2, 24), []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("dtype", "autocast", "rtol"),
    [(torch.float32, False, 1e-5), (torch.bfloat16, False, 1e-2), (torch.float32, True, 1e-2)],
    ids=["float32", "bfloat16 base", "autocast"],
)
def test_losses_of_20_steps_are_those_of_peft(dtype, autocast, rtol, fused):
    patched = copy.deepcopy(plain := make_llama(dtype))
    assert {p.dtype for p in plain.parameters() if p.requires_grad} == {torch.float32}
    expected, losses = losses_of(plain, autocast, False), losses_of(patched, autocast, True)
    assert len(fused) == 20 * 14
    assert expected[-1] < 0.9 * expected[0]  # so the adapters do learn
    torch.testing.assert_close(losses[:5], expected[:5], rtol=rtol, atol=0)
    torch.testing.assert_close(losses, expected, rtol=max(2 * rtol, 1e-4), atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_masks_again(use_reentrant, fused):
    model = make_llama(lora_dropout=0.3)
    lk.patch_peft(model)
    tokens = torch.arange(48).reshape(2, 24)

    def gradients(seed):
        torch.manual_seed(seed)
        model.train().zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    plain, other = gradients(1), gradients(2)
    assert len(fused) == 2 * 14
    assert not torch.allclose(plain, other, rtol=0.01)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_close(gradients(1), plain)
    assert len(fused) == 4 * 14  # forward ran twice


@torch.no_grad()
def draws_of(layer, x):
    """512 draws of y for the same x, in 4 calls: each row of a batch has its own mask."""
    return torch.cat([layer(x.expand(128, *x.shape)) for _ in range(4)])


def test_dropout_has_the_distribution_of_peft(fused):
    model = make_model(lora_dropout=0.1)
    plain = copy.deepcopy(model)
    lk.patch_peft(model)
    x = make_x().flatten(0, 1)
    ours, theirs = draws_of(up(model), x), draws_of(up(plain), x)
    assert len(fused) == 4
    assert len(ours.unique(dim=0)) == 512
    error = ((ours.var(0) + theirs.var(0)) / 512).sqrt()
    # 480 outputs at 6 standard errors: one run in a million fails for no reason.
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 6 * error).all()
    assert ours.var(0).mean() / theirs.var(0).mean() == pytest.approx(1, abs=0.1)


def test_dropout_keeps_the_right_fraction():
    layer = up(make_model(bias=False, lora_dropout=0.1, r=24, lora_alpha=24))
    nn.init.zeros_(layer.base_layer.weight)
    for adapter in (layer.lora_A, layer.lora_B):
        nn.init.eye_(adapter["default"].weight)
    lk.patch_peft(layer)
    y = draws_of(layer, torch.ones(40, 24))[..., :24]  # D(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.9), rtol=1e-4, atol=0)
    error = (0.1 * 0.9 / y.numel()) ** 0.5 + 1 / 65536  # p is applied in steps of that size
    assert kept.float().mean().item() == pytest.approx(0.9, abs=6 * error)

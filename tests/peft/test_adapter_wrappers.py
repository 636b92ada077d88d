"""Adapter files of wrapped models are those of the bare model, and load into all of them."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from tests.support.adapters import Net, adapt, assert_unchanged, listing, snapshot

checkpointing = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")


def compiled(module):
    return torch.compile(module, backend="eager")


def around(path, wrap):
    """Return what wraps a submodule, in place, and gives the model back."""

    def wrap_submodule(model):
        model.set_submodule(path, wrap(model.get_submodule(path)))
        return model

    return wrap_submodule


def in_place(path):
    def compile_submodule(model):
        model.get_submodule(path).compile(backend="eager")
        return model

    return compile_submodule


def prepared(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # another test's precision
    return accelerate.Accelerator(cpu=True, mixed_precision="no").prepare_model(model)


def nested(model):
    model.z.q = compiled(checkpointing.checkpoint_wrapper(model.z.q))
    model.z = checkpointing.offload_wrapper(model.z)
    return torch.optim.swa_utils.AveragedModel(compiled(nn.DataParallel(model)))


def of_inner_modules(model):
    for layer in (model.q, model.z.q):
        if isinstance(layer, lk.LoRALinear):
            layer.lora_A = checkpointing.checkpoint_wrapper(layer.lora_A)
            layer.lora_B = compiled(layer.lora_B)
            layer.base_layer = checkpointing.checkpoint_wrapper(layer.base_layer)
    return model


WRAPS = {
    "compiled": compiled,
    "a compiled block": around("z", compiled),
    "a compiled layer": around("q", compiled),
    "compiled in place": in_place(""),
    "a layer compiled in place": in_place("z.q"),
    "a checkpointed block": around("z", checkpointing.checkpoint_wrapper),
    "a checkpointed layer": around("z.q", checkpointing.checkpoint_wrapper),
    "an offloading layer": around("q", checkpointing.offload_wrapper),
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "accelerate": prepared,
    "a layer wrapped twice": around("q", lambda m: compiled(checkpointing.checkpoint_wrapper(m))),
    "nested": nested,
    "inner modules": of_inner_modules,
}
by_wrap = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
SETTINGS = {"q": {"r": 3}, "z.q": {"lora_alpha": 2}, "zok": {}}


@by_wrap
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_wrapped_model_saves_what_the_bare_one_does(wrap, bias, tmp_path):
    bare = adapt(Net(), SETTINGS, bias=bias)
    lk.save_adapter(bare, tmp_path / "bare")
    lk.save_adapter(wrap(copy.deepcopy(bare)), tmp_path / "wrapped")
    assert listing(tmp_path / "wrapped") == listing(tmp_path / "bare")


@by_wrap
@pytest.mark.parametrize("into", ["plain linears", "LoRALinears"])
def test_a_file_loads_into_a_wrapped_model(wrap, into, tmp_path):
    fresh, x = Net(), torch.randn(5, 8)
    saved = adapt(copy.deepcopy(fresh), SETTINGS, bias="all")
    lk.save_adapter(saved, tmp_path)
    if into == "LoRALinears":
        adapt(fresh, {path: {"r": own.get("r", 2)} for path, own in SETTINGS.items()})
    wrapped = wrap(fresh)
    wrapped(x)  # compiled before the file is there
    lk.load_adapter(wrapped, tmp_path)
    torch.testing.assert_close(wrapped(x), saved(x))
    wrapped(x).sum().backward()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert len(trained) >= 6
    assert all(p.grad is not None for p in trained)


@by_wrap
def test_a_refused_file_changes_no_wrapped_model(wrap, tmp_path):
    lk.save_adapter(adapt(Net(), SETTINGS), tmp_path)
    fresh, x = Net(), torch.randn(5, 8)
    fresh.zok = nn.Linear(8, 9)  # the last layer of the file doesn't fit
    wrapped = wrap(fresh)
    before, y = snapshot(wrapped), wrapped(x)
    with pytest.raises(ValueError, match=r"zok\.lora_B: expected floats"):
        lk.load_adapter(wrapped, tmp_path)
    assert_unchanged(wrapped, before)
    assert torch.equal(wrapped(x), y)


def test_a_load_that_fails_halfway_leaves_a_compiled_layer_as_it_was(tmp_path, monkeypatch):
    lk.save_adapter(adapt(Net(), {"q": {}, "zok": {}}), tmp_path)
    model, x, real = around("q", compiled)(Net()), torch.randn(5, 8), lk.LoRALinear.from_linear
    before, y = snapshot(model), model(x)

    def from_linear(linear, **settings):
        if linear is model.zok:
            raise torch.OutOfMemoryError("simulated")
        return real(linear, **settings)

    monkeypatch.setattr(lk.LoRALinear, "from_linear", from_linear)
    with pytest.raises(torch.OutOfMemoryError):
        lk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("name", ["module", "_orig_mod", "_fsdp_wrapped_module"])
def test_a_module_with_a_wrappers_attribute_is_no_wrapper(name, tmp_path):
    def model():
        holder = nn.Module()
        setattr(holder, name, Net())
        return holder

    saved, loaded = model(), nn.DataParallel(model())
    adapt(getattr(saved, name), {"q": {}})
    lk.save_adapter(saved, tmp_path)
    lk.load_adapter(loaded, tmp_path)
    ours, theirs = getattr(loaded.module, name).q, getattr(saved, name).q
    assert torch.equal(ours.lora_B.weight, theirs.lora_B.weight)
    config = (tmp_path / "adapter_config.json").read_text()
    assert f'"{name}.q"' in config


def test_a_wrapper_may_be_all_there_is(tmp_path):
    layer = lk.LoRALinear(8, 4, r=2)
    lk.save_adapter(compiled(layer), tmp_path)
    model = nn.DataParallel(nn.Linear(8, 4))
    lk.load_adapter(model, tmp_path)
    assert torch.equal(model.module.lora_A.weight, layer.lora_A.weight)


def test_a_layer_at_two_paths_is_saved_by_the_first(tmp_path):
    model = adapt(Net(), {"q": {}})
    lk.save_adapter(model, tmp_path / "one")
    model.again = compiled(model.q)
    lk.save_adapter(model, tmp_path / "two")
    assert listing(tmp_path / "two") == listing(tmp_path / "one")

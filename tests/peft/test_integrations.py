"""Switches of trainers by their interfaces: the callback, Axolotl's plugin, LORA_KERNELS_AUTO."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
from torch import nn

import lora_kernels as lk
from lora_kernels.integrations import auto, is_patched, tell

peft = pytest.importorskip("peft")
PLUGIN = "lora_kernels.integrations.axolotl.LoraKernelsPlugin"


def plain():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def adapted(targets=("0", "1")):
    return peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=list(targets)))


def without_lora(model=None):
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    return peft.get_peft_model(model or plain(), config)


@pytest.fixture
def callback():
    pytest.importorskip("transformers")

    def call(event, callback, model):
        # As transformers' CallbackHandler calls it, with more than the callback asks for.
        given = {"model": model, "optimizer": None, "processing_class": None}
        return getattr(callback, event)(None, None, None, **given)

    return call


def test_callback_patches_when_the_trainer_is_made(callback, capsys):
    ours, model = lk.TrainerCallback(impl="eager"), adapted()
    assert callback("on_init_end", ours, model) is None
    assert ours.report == lk.patch_peft(model, impl="eager")
    assert capsys.readouterr().err == f"{ours.report}\n"
    assert model.base_model.model[0]._lora_kernels_impl == "eager"
    callback("on_train_begin", ours, model)
    assert capsys.readouterr().err == ""


def test_callback_packs(callback):
    ours = lk.TrainerCallback(prepack=True)
    callback("on_init_end", ours, adapted())
    assert ours.report.prepack is not None


@pytest.mark.parametrize("event", ["adapters come later", "another model"])
def test_callback_patches_what_comes_later(callback, event):
    ours, model = lk.TrainerCallback(), plain()
    callback("on_init_end", ours, adapted() if event == "another model" else model)
    assert (ours.report is None) == (event != "another model")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    callback("on_train_begin", ours, model)
    assert ours.report.patched == ["base_model.model.0"]
    assert is_patched(model)


def test_callback_refuses_what_it_cannot_patch(callback):
    with pytest.raises(ValueError, match="impl: expected one of"):
        lk.TrainerCallback(impl="nonsense")
    with pytest.raises(ValueError, match="expected a model with PEFT LoRA layers"):
        callback("on_train_begin", lk.TrainerCallback(), plain())
    with pytest.raises(ValueError, match="expected a model with PEFT LoRA layers"):
        callback("on_init_end", lk.TrainerCallback(), without_lora())


def test_callback_without_transformers_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "lora_kernels.integrations.transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="TrainerCallback: expected transformers, got no such"):
        _ = lk.TrainerCallback
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lk.nonsense


@pytest.mark.parametrize(("rank", "told"), [(None, "report\n"), ("0", "report\n"), ("1", "")])
def test_one_process_of_a_run_tells(rank, told, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    tell("report")
    assert capsys.readouterr().err == told


@pytest.fixture
def switched(monkeypatch):
    """A function that returns names of PEFT's as LORA_KERNELS_AUTO leaves them."""

    def switched(value, make=peft.get_peft_model):
        monkeypatch.setenv("LORA_KERNELS_AUTO", value)
        model = type("PeftModel", (peft.PeftModel,), {})
        names = SimpleNamespace(get_peft_model=make, PeftModel=model)
        auto.switch_on(names)
        return names

    return switched


@pytest.mark.parametrize(
    ("value", "impl", "packed"),
    [
        ("1", "auto", False),
        ("auto", "auto", False),
        ("eager", "eager", False),
        ("prepack", "auto", True),
        ("eager, prepack", "eager", True),
        ("1,prepack", "auto", True),
    ],
)
def test_environment_takes_what_patch_peft_takes(value, impl, packed, switched):
    config = peft.LoraConfig(r=2, target_modules=["0"])
    model = switched(value).get_peft_model(plain(), config)
    layer = model.base_model.model[0]
    assert layer._lora_kernels_impl == impl
    assert (layer._lora_kernels_packed is not None) == packed


def test_environment_serves_from_pretrained(switched, tmp_path):
    adapted(["0"]).save_pretrained(tmp_path)
    model = switched("1").PeftModel.from_pretrained(plain(), tmp_path)
    assert type(model).__name__ == "PeftModel"
    assert is_patched(model)


@pytest.mark.parametrize("value", ["yes", "cuda,cpu", "1;prepack", "2"])
def test_environment_refuses_what_it_does_not_know(value, switched):
    with pytest.raises(ValueError, match="LORA_KERNELS_AUTO: expected 0, 1 or words"):
        switched(value)


def test_environment_goes_on_with_what_it_cannot_patch(switched, caplog):
    def make(model, config):
        return without_lora(model)

    with caplog.at_level(logging.WARNING, "lora_kernels"):
        model = switched("1", make).get_peft_model(plain(), None)
    assert not is_patched(model)
    assert "LORA_KERNELS_AUTO: a PeftModel runs unpatched: model: expected" in caplog.text
    with pytest.raises(ValueError, match="expected a model with PEFT LoRA layers"):
        switched("eager", make).get_peft_model(plain(), None)


class Config(dict):
    """Axolotl's configuration: a key that isn't there is None, as an attribute too."""

    def __getattr__(self, name):
        return self.get(name)


@pytest.fixture
def axolotl(monkeypatch):
    """Axolotl 0.19's documented interface, and how it uses it: a plugin with its configuration."""
    pydantic = pytest.importorskip("pydantic")
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, PLUGIN.rpartition(".")[0], raising=False)

    def named(path):
        module, _, name = path.rpartition(".")
        return getattr(__import__(module, fromlist=[name]), name)

    class Own(pydantic.BaseModel):
        adapter: str
        lora_qkv_kernel: bool | None = None
        lora_o_kernel: bool | None = None
        lora_mlp_kernel: bool | None = None

        @pydantic.model_validator(mode="before")
        @classmethod
        def _enable_kernels(cls, given):
            kernels = {name: True for name in cls.model_fields if name.endswith("_kernel")}
            unset = all(given.get(name) is None for name in kernels)
            return {**given, **kernels} if unset else given

    def configured(**keys):
        plugin, given = named(PLUGIN)(), Config(adapter="lora", **keys)
        plugin.register(given)
        schema = type("AxolotlInputConfig", (Own, named(plugin.get_input_args())), {})
        return plugin, Config(schema(**given).model_dump(exclude_none=True))

    return configured


def test_axolotl_patches_when_adapters_are_loaded(axolotl, capsys):
    plugin, cfg = axolotl()
    assert {cfg.lora_qkv_kernel, cfg.lora_o_kernel, cfg.lora_mlp_kernel} == {False}
    model = adapted()
    plugin.post_lora_load(cfg, model)
    assert "2 LoRA layers patched, 0 left" in capsys.readouterr().err
    plugin.post_trainer_create(cfg, SimpleNamespace(model=model))
    assert capsys.readouterr().err == ""


def test_axolotl_patches_what_the_trainer_makes(axolotl):
    """For DPO and its like Axolotl loads no adapter: TRL's trainer does."""
    plugin, cfg = axolotl(lora_kernels_impl="eager", lora_kernels_prepack=True)
    model = plain()
    plugin.post_lora_load(cfg, model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    plugin.post_trainer_create(cfg, SimpleNamespace(model=model))
    layer = model.base_model.model[0]
    assert layer._lora_kernels_impl == "eager"
    assert layer._lora_kernels_packed is not None


def test_axolotl_refuses_a_wrong_configuration(axolotl):
    with pytest.raises(ValueError, match="impl: expected one of"):
        axolotl(lora_kernels_impl="nonsense")
    with pytest.raises(ValueError, match="lora_mlp_kernel: expected false beside"):
        axolotl(lora_mlp_kernel=True)

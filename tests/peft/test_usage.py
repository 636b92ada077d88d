"""Nothing is unfused in silence: counts, reasons, warnings, adapters that come later."""

import copy
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk

peft = pytest.importorskip("peft")


class Residual(nn.Module):
    """Changes b's input after b has read it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.a(x)
        y = self.b(h)
        h += 1
        return y + h


def two(targets=("0",)):
    config = peft.LoraConfig(r=2, target_modules=list(targets))
    return peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)


def use(model, path="base_model.model.0"):
    return lk.report(model).layers[path]


def test_calls_are_counted_with_the_last_reason(caplog):
    model, x = two(), torch.randn(2, 8)
    lk.patch_peft(model)
    model(x)
    layer = model.base_model.model[0]
    layer.scaling["default"] = torch.ones(8)
    with caplog.at_level(logging.WARNING, "lora_kernels"):
        for _ in range(3):
            model(x)
    found = use(model)
    assert (found.fused, found.left) == (1, 3)
    assert found.reason == found.state == "scaling is a torch.float32 tensor of shape [8]"
    assert [r.name for r in caplog.records] == ["lora_kernels"]  # a reason once
    layer.scaling["default"] = 1.0
    assert use(model).state is None
    assert "calls so far: 1 fused, 3 left" in str(lk.report(model))


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_adapters_of_two_dtypes_are_pefts_to_refuse(part, dtype):
    """Under autocast, which casts both, they are fused."""
    model, x = two(), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    lk.patch_peft(model)
    for each in (model, plain):
        getattr(each.base_model.model[0], part)["default"].to(dtype)
        with pytest.raises(RuntimeError, match="dtype"):
            each(x)
    assert use(model).reason.startswith("lora_A is torch.")
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0.05)
        assert use(model).fused == 1


@pytest.mark.parametrize("parts", [["lora_A"], ["lora_B"], ["lora_A", "lora_B"]])
def test_autocast_leaves_float64_adapters_to_peft(parts):
    """PEFT refuses one beside another dtype, and computes with two."""
    model, x = two(), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    lk.patch_peft(model)
    found = []
    for each in (model, plain):
        for part in parts:
            getattr(each.base_model.model[0], part)["default"].double()
        try:
            with torch.autocast("cpu", torch.bfloat16):
                found.append(each(x))
        except RuntimeError as error:
            found.append(str(error))
    if len(parts) == 2:
        torch.testing.assert_close(*found, rtol=0, atol=0)
    else:
        assert found[0] == found[1]
    assert use(model).fused == 0


@pytest.mark.parametrize("part", ["x", "base_layer", "lora_A", "lora_B"])
def test_inference_tensors_are_pefts_to_save_or_to_refuse(part):
    model, x = two(), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    lk.patch_peft(model)
    found = []
    for each in (model, plain):
        layer, given = each.base_model.model[0], x
        with torch.inference_mode():
            if part == "x":
                given = x.clone()
            else:
                module = getattr(layer, part)
                module = module if part == "base_layer" else module["default"]
                module._parameters["weight"] = module.weight.detach().clone()
        try:
            found.append(each(given).detach())
        except RuntimeError as error:
            found.append(str(error))
    if isinstance(found[1], str):
        assert found[0] == found[1]
    else:
        torch.testing.assert_close(found[0], found[1])
    assert use(model).left == 1
    with torch.no_grad():
        model(x)
    assert use(model).fused == 1


def test_states_that_are_asked_for_warn_of_nothing(caplog):
    model, x = two(), torch.randn(2, 8)
    lk.patch_peft(model)
    with caplog.at_level(logging.WARNING, "lora_kernels"), model.disable_adapter():
        model(x)
    assert use(model).left == 1
    assert not caplog.records


def test_report_refuses_what_has_no_layer():
    with pytest.raises(ValueError, match="expected one with LoRA layers, got none in Linear"):
        lk.report(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        lk.report(3)


@pytest.mark.parametrize("how", ["as it is", "deepcopy", "pickle"])
def test_layers_of_adapters_added_later_are_fused(how):
    model = two()
    lk.patch_peft(model)
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["0", "1"]))
    model.set_adapter("more")
    model(torch.randn(2, 8))
    assert [layer.fused for layer in lk.report(model).layers.values()] == [1, 1]
    assert lk.unpatch_peft(model) == 2
    assert type(model.base_model) is peft.LoraModel
    model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["0", "1"]))
    assert all(
        type(m).__module__.startswith("peft")
        for m in model.base_model.modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    )


def test_layers_of_a_loaded_adapter_are_fused(tmp_path):
    two(["1"]).save_pretrained(tmp_path)
    model = two()
    lk.patch_peft(model)
    model.load_adapter(tmp_path, "loaded")
    model.set_adapter("loaded")
    model(torch.randn(2, 8))
    assert use(model, "base_model.model.1").fused == 1


def test_layers_that_nobody_patched_are_named():
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    )
    lk.patch_peft(model)
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["1"]), model, adapter_name="more"
    )
    assert use(model, "1").state == "not patched: call patch_peft again"


def lora_layer(kind):
    """A model whose layer "b" reads what is changed afterwards."""
    if kind == "patched":
        config = peft.LoraConfig(r=2, target_modules=["b"], init_lora_weights=False)
        model = peft.get_peft_model(Residual(), config)
        lk.patch_peft(model)
        return model
    model = Residual()
    layer = lk.LoRALinear.from_linear(model.b)
    model.b = layer
    if kind == "lora_linear":
        parts = (model.b.base_layer.weight, layer.lora_A.weight, layer.lora_B.weight)
        del model.b
        model.b = lambda h: lk.lora_linear(h, *parts)
    return model


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("patched", "LoRA layer 'base_model.model.b'"),
        ("LoRALinear", "lora_linear"),
        ("lora_linear", "lora_linear"),
    ],
)
def test_an_input_changed_in_place_is_named_with_the_cure(kind, name):
    y = lora_layer(kind)(torch.randn(2, 8)).sum()
    with pytest.raises(RuntimeError, match=rf"^{name}: expected its input .* change a copy"):
        y.backward()


def twice(function):
    return lambda *given, **named: 2 * function(*given, **named)


REPLACED = {
    "functional.linear": (functional, "linear"),
    "Linear.forward": (nn.Linear, "forward"),
    "Linear.__call__": (nn.Linear, "__call__"),
    "Module.__call__": (nn.Module, "__call__"),
    "Module._call_impl": (nn.Module, "_call_impl"),
    "Dropout.forward": (nn.Dropout, "forward"),
    "functional.dropout": (functional, "dropout"),
    "PEFT's Linear.forward": (peft.tuners.lora.Linear, "forward"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_a_call_of_a_submodule_goes_through_may_be_replaced(name, monkeypatch):
    """As profilers, quantisers and tests do: a fused call would go past it."""
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)),
        peft.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False),
    )
    plain, x = copy.deepcopy(model), torch.randn(2, 8)
    lk.patch_peft(model)
    owner, attribute = REPLACED[name]
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, twice(getattr(owner, attribute)))
        torch.manual_seed(5)
        expected = plain(x)
        torch.manual_seed(5)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert use(model).reason.endswith("was replaced")
    model(x)
    assert use(model).fused == 1


class TwiceTheFunction(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        return 2 * y if function is functional.linear else y


class TwiceTheOperator(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        y = op(*args, **(kwargs or {}))
        return 2 * y if op is torch.ops.aten.addmm.default else y


class Counter(TorchDispatchMode):
    lora_kernels_only_looks = True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [TwiceTheFunction, TwiceTheOperator])
def test_a_mode_of_somebody_elses_is_seen(mode):
    model, x = two(), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    lk.patch_peft(model)
    with mode():
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    assert use(model).reason == f"a torch function or dispatch mode is active, {mode.__name__}"
    # Modes of torch's own, and one that says it only looks.
    ours = torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True), Counter()
    for fused, other in enumerate(ours, start=1):
        with other:
            model(x)
        assert use(model).fused == fused


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_dropout"])
def test_the_call_of_one_module_may_be_replaced(part):
    model, x = two(), torch.randn(2, 8)
    lk.patch_peft(model)
    layer = model.base_model.model[0]
    module = getattr(layer, part)
    module = module if part == "base_layer" else module["default"]
    own = module._call_impl
    module._call_impl = lambda *args, **kwargs: 2 * own(*args, **kwargs)
    plain = copy.deepcopy(model)
    lk.unpatch_peft(plain)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    assert use(model).reason.endswith("has hooks")


# In a child for each name, so that torch and PEFT are imported once.
BEFORE_THE_IMPORT = """
import os, sys, torch, peft
from torch import nn
from torch.nn import functional

def check(owner, attribute):
    had, own = attribute in vars(owner), getattr(owner, attribute)
    setattr(owner, attribute, lambda *given, **named: own(*given, **named))
    import lora_kernels as lk
    settings = peft.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), settings)
    lk.patch_peft(model)
    model(torch.randn(2, 8))
    (layer,) = lk.report(model).layers.values()
    assert (layer.fused, layer.left) == (0, 1) and layer.reason.endswith("was replaced"), layer
    setattr(owner, attribute, own) if had else delattr(owner, attribute)
    model(torch.randn(2, 8))
    assert lk.report(model).layers.popitem()[1].fused == 1

OWNERS = {"functional": functional, "Linear": nn.Linear, "Module": nn.Module,
          "Dropout": nn.Dropout, "PEFT's Linear": peft.tuners.lora.Linear}
torch.set_num_threads(1)
for name in sys.argv[1:]:
    owner, _, attribute = name.rpartition(".")
    child = os.fork()
    if child == 0:
        check(OWNERS[owner], attribute)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.mark.slow
def test_what_was_replaced_before_the_import():
    """And is put back afterwards; deepspeed.zero.Init and profilers are entered in any order."""
    command = [sys.executable, "-c", BEFORE_THE_IMPORT, *REPLACED]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("what", ["x under autocast", "scaling"])
def test_tensors_of_zeros_without_memory(what):
    """torch's own, such as forward differentiation makes; operators see them with memory."""
    model, x = two(), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    lk.patch_peft(model)
    if what == "scaling":
        for each in (model, plain):
            each.base_model.model[0].scaling["default"] = torch._efficientzerotensor(())
    else:
        x = torch._efficientzerotensor((2, 8))
    with torch.autocast("cpu", torch.bfloat16, enabled=what != "scaling"):
        torch.testing.assert_close(model(x), plain(x))

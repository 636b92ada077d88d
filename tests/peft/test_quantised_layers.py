"""PEFT's layers over weights of torchao and of transformers' FP8 checkpoints."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.nn import LoRALinear
from lora_kernels.quantized import read_quantized
from tests.support.quantised import is_served, results

peft = pytest.importorskip("peft")
X = torch.linspace(-1, 1, 5 * 48).reshape(5, 48)


def adapted(base, patched=True, **asked):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(base), config)
    if patched:
        lk.patch_peft(model, **asked)
    return model


def torchao_linear(word, **how):
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(2)
    layer = nn.Linear(48, 40)
    config = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}.get(word, word)
    quantization.quantize_(layer, getattr(quantization, config)(**how))
    return layer


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
@pytest.mark.parametrize("word", ["int8", "float8"])
def test_torchao_weights(word):
    ours, theirs = adapted(torchao_linear(word)), adapted(torchao_linear(word), patched=False)
    layer = ours.base_model.model[0]
    assert is_served(lk.report(ours).layers["base_model.model.0"].impl, word)
    for a, b in zip(results(ours, X), results(theirs, X), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = word == "int8"  # torchao's float8 product and a float32 bias give float32
        torch.testing.assert_close(ours(X), theirs(X), rtol=0.02, atol=0.02, check_dtype=dtypes)
    torch.testing.assert_close(copy.deepcopy(layer)(X), layer(X))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), ours(X))
    assert lk.unpatch_peft(ours) == 1
    assert type(layer) is type(theirs.base_model.model[0])


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
def test_without_adapters_what_no_fused_call_takes_is_peft_s():
    pair = [adapted(torchao_linear("int8"), patched=patched) for patched in (True, False)]
    for model in pair:
        model.base_model.disable_adapter_layers()
    for x in (X.long(), X[:, :40], X.to("meta"), torch.tensor(1.0), X.to_sparse()):
        errors = []
        for model in pair:
            with pytest.raises((RuntimeError, IndexError)) as error:
                model(x)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]
    got, expected = (model(X.to(torch.complex64)) for model in pair)
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
def test_torchao_weights_whose_product_quantises_activations_are_left():
    model = adapted(torchao_linear("Int8DynamicActivationInt8WeightConfig"))
    state = lk.report(model).layers["base_model.model.0"].state
    assert state == "base layer weight is a Int8Tensor whose product quantises activations too"


def fp8_linear(block=(128, 128)):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    torch.manual_seed(2)
    layer = fp8.FP8Linear(48, 40, block_size=block, has_bias=True).requires_grad_(False)
    layer.weight.data = torch.randn(40, 48).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand_like(layer.weight_scale_inv)
    layer.bias.data = torch.randn(40)
    return layer


def test_fp8_layers_are_fused_on_request():
    base = fp8_linear()
    left = adapted(base)
    state = lk.report(left).layers["base_model.model.0"].state
    assert state.startswith("base layer quantises activations too; fp8=")
    assert lk.patch_peft(left, fp8="weights").patched == ["base_model.model.0"]
    dense = nn.Linear(48, 40).requires_grad_(False)
    dense.weight.data = lk.quantized_weight(base).decode()
    dense.bias.data = base.bias.data.clone()
    theirs = adapted(dense, patched=False)
    # PEFT had rounded the adapters to the base layer's dtype.
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(left))
    for a, b in zip(results(left, X), results(theirs, X), strict=True):
        torch.testing.assert_close(a, b)
    with left.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(left(X), theirs(X))
    left.add_adapter("second", left.peft_config["default"])
    left.set_adapter("second")
    assert lk.report(left).layers["base_model.model.0"].state is None


def test_layers_that_come_later_are_patched_as_asked():
    model = nn.Sequential(fp8_linear(), nn.Linear(40, 8))
    config = peft.LoraConfig(r=4, target_modules=["1"])
    model = peft.get_peft_model(model, config)
    lk.patch_peft(model, fp8="weights")
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["0"]))
    model.set_adapter("second")
    assert lk.report(model).layers["base_model.model.0"].state is None


@pytest.mark.parametrize("make", [fp8_linear, lambda: torchao_linear("int8")])
def test_loralinear(make):
    base = make().requires_grad_(False)
    layer = LoRALinear.from_linear(base, r=4)
    nn.init.normal_(layer.lora_B.weight)
    weight = read_quantized(base).weight.decode()
    wanted = nn.functional.linear(X, weight, base.bias)
    wanted = wanted + layer.lora_B(layer.lora_A(X)) * layer.scaling
    torch.testing.assert_close(layer(X), wanted)
    assert layer.base_layer is base


def test_trained_codes_are_named():
    layer = fp8_linear()
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight requires grad, which codes have none of"):
        lk.quantized_weight(layer)

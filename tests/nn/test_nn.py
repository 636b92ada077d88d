"""LoRALinear: its names, what it computes, what merging does, and which arguments it refuses."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of one output of size 1: four roundings to the dtype.
ATOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}


def make_layer(**settings):
    """A layer of 24 to 16 features whose lora_B is not zero; outputs of size 1 for x of size 1."""
    layer = lk.LoRALinear(24, 16, r=4, lora_alpha=6, **settings)
    nn.init.normal_(layer.lora_B.weight, std=0.5)
    return layer


def make_x(dtype=torch.float32):
    return torch.randn(5, 7, 24).to(dtype)


def adapter_branch(layer, x):
    return x @ layer.lora_A.weight.T @ layer.lora_B.weight.T


@pytest.mark.parametrize("base_bias", [True, False])
@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 6 / 4), (True, 6 / 2)])
def test_forward_is_the_equation(use_rslora, scaling, base_bias):
    layer = make_layer(use_rslora=use_rslora, base_bias=base_bias, dtype=torch.float64)
    x = make_x(torch.float64)
    assert layer.scaling == scaling
    expected = x @ layer.base_layer.weight.T + scaling * adapter_branch(layer, x)
    expected = expected if layer.bias is None else expected + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_a_new_layer_computes_its_base_layer():
    layer = lk.LoRALinear(24, 16)
    x = make_x()
    assert layer.lora_A.weight.any()
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=1e-6)


def test_adapter_is_drawn_as_peft_draws_it():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"q": nn.Linear(24, 16)})
    config = peft.LoraConfig(r=4, target_modules=["q"])
    torch.manual_seed(3)
    layer = lk.LoRALinear.from_linear(copy.deepcopy(model["q"]), r=4)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(model, config).base_model.model["q"]
    assert torch.equal(layer.lora_A.weight, theirs.lora_A["default"].weight)
    assert torch.equal(layer.lora_B.weight, theirs.lora_B["default"].weight)


def test_reset_draws_the_adapter_anew():
    layer = make_layer()
    old_a, old_base = layer.lora_A.weight.clone(), layer.base_layer.weight.clone()
    layer.reset_lora_parameters()
    assert not layer.lora_B.weight.any()
    assert not torch.equal(layer.lora_A.weight, old_a)
    assert layer.lora_A.weight.abs().max() <= 24**-0.5  # the bound of Kaiming, a = sqrt(5)
    assert torch.equal(layer.base_layer.weight, old_base)


@pytest.mark.parametrize("base_bias", [True, False])
def test_state_dict_has_the_same_keys_merged_or_not(base_bias):
    layer = make_layer(base_bias=base_bias)
    keys = ["base_layer.weight", "lora_A.weight", "lora_B.weight"]
    keys += ["base_layer.bias"] if base_bias else []
    assert sorted(layer.state_dict()) == sorted(keys)
    layer.merge()
    assert sorted(layer.state_dict()) == sorted(keys)
    layer.unmerge()
    assert sorted(layer.state_dict()) == sorted(keys)


def test_state_dict_carries_the_layer():
    layer, other, x = make_layer(), make_layer(), make_x()
    assert not torch.allclose(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_from_linear_keeps_the_linear_and_freezes_it():
    linear = nn.Linear(24, 16, dtype=torch.bfloat16).eval()
    weight, bias = linear.weight, linear.bias
    layer = lk.LoRALinear.from_linear(linear, r=4)
    assert layer.base_layer is linear
    assert layer.base_layer.weight is weight
    assert layer.bias is bias
    assert not weight.requires_grad
    assert not bias.requires_grad
    assert not layer.training
    assert not layer.lora_A.training
    assert layer.lora_A.weight.dtype == torch.bfloat16
    assert [tuple(p.shape) for p in (layer.lora_A.weight, layer.lora_B.weight)] == [
        (4, 24),
        (16, 4),
    ]


@pytest.mark.parametrize("make", ["class", "from_linear"])
@pytest.mark.parametrize(("bias", "trained"), [("none", False), ("all", True), ("lora_only", True)])
def test_bias_mode_says_whether_the_bias_trains(make, bias, trained):
    if make == "class":
        layer = lk.LoRALinear(24, 16, bias=bias)
    else:
        layer = lk.LoRALinear.from_linear(nn.Linear(24, 16), bias=bias)
    nn.init.normal_(layer.lora_B.weight)
    layer(make_x()).square().sum().backward()
    with_grad = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert with_grad == {"lora_A.weight", "lora_B.weight"} | (
        {"base_layer.bias"} if trained else set()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerge_gives_the_weight_back_bit_for_bit(dtype):
    layer = make_layer(dtype=dtype)
    with torch.no_grad():
        # Beside so large an update the weight's low bits are lost, so no subtraction finds them.
        layer.lora_B.weight.mul_(100)
    weight, before = layer.base_layer.weight, layer.base_layer.weight.clone()
    layer.merge()
    assert layer.merged
    assert not torch.equal(layer.base_layer.weight, before)
    layer.unmerge()
    assert not layer.merged
    assert layer.base_layer.weight is weight
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_forward_equals_unmerged(dtype, use_rslora):
    layer, x = make_layer(dtype=dtype, use_rslora=use_rslora), make_x(dtype)
    unmerged = layer(x)
    layer.merge()
    scale = unmerged.abs().max().item()
    torch.testing.assert_close(layer(x), unmerged, rtol=0, atol=ATOL[dtype] * scale)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_merging_twice_is_merging_once():
    layer = make_layer()
    before = layer.base_layer.weight.clone()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)
    layer.merge()
    once = layer.base_layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.base_layer.weight, once)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_the_kept_weight_moves_with_the_layer():
    layer = make_layer()
    before = layer.base_layer.weight.double()
    layer.merge()
    layer.double()
    layer.unmerge()
    assert layer.base_layer.weight.dtype == torch.float64
    assert torch.equal(layer.base_layer.weight, before)


def test_dropout_acts_in_training_only():
    layer, x = make_layer(lora_dropout=0.5), make_x()
    first, second = layer(x), layer(x)
    assert not torch.allclose(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.lora_dropout = 0.0
    without = layer(x)
    layer.train()
    assert torch.equal(layer(x), without)


def test_dropout_leaves_the_base_product_and_a_merged_layer_alone():
    layer, x = make_layer(lora_dropout=0.5), make_x()
    nn.init.zeros_(layer.lora_B.weight)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=1e-6)
    nn.init.normal_(layer.lora_B.weight)
    layer.merge()
    assert torch.equal(layer(x), layer(x))


def test_deep_copy_shares_nothing():
    layer, x = make_layer(), make_x()
    before = layer.base_layer.weight.clone()
    layer.merge()
    twin = copy.deepcopy(layer)
    merged = layer(x)
    twin.unmerge()
    assert torch.equal(twin.base_layer.weight, before)
    nn.init.zeros_(twin.lora_B.weight)
    assert layer.merged
    assert torch.equal(layer(x), merged)
    layer.unmerge()
    torch.testing.assert_close(layer(x), merged)


@pytest.mark.parametrize("make", ["class", "from_linear"])
def test_float32_adapter_on_a_bfloat16_base(make):
    settings = {"r": 4, "adapter_dtype": torch.float32}
    if make == "class":
        layer = lk.LoRALinear(24, 16, dtype=torch.bfloat16, **settings)
    else:
        linear = nn.Linear(24, 16, dtype=torch.bfloat16)
        layer = lk.LoRALinear.from_linear(linear, **settings)
    nn.init.normal_(layer.lora_B.weight)
    y = layer(make_x(torch.bfloat16))
    assert y.dtype == layer.base_layer.weight.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert layer.lora_A.weight.grad.dtype == torch.float32
    assert layer.lora_B.weight.grad.dtype == torch.float32
    before = layer.base_layer.weight.clone()
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_settings_reach_the_function(monkeypatch):
    calls = []
    monkeypatch.setattr(lk.nn.linear, "run", lambda *args: calls.append(args[1:]))
    layer = make_layer(lora_dropout=0.25, impl="reference")
    layer(make_x())
    layer.eval()(make_x())
    assert [others for _, *others in calls] == [["reference", None]] * 2  # impl, autocast's dtype
    dropped, kept = (call for call, *_ in calls)
    assert dropped.adapter.scaling == kept.adapter.scaling == 1.5
    assert (dropped.dropout.threshold, kept.dropout) == (16384, None)


def test_repr_says_what_the_layer_is():
    layer = make_layer(lora_dropout=0.25, use_rslora=True, bias="lora_only", impl="eager")
    first_line = repr(layer).splitlines()[1]
    for part in (
        "in_features=24, out_features=16, r=4, lora_alpha=6, lora_dropout=0.25, use_rslora=True",
        "scaling=3",
        "bias='lora_only'",
        "merged=False",
        "impl='eager'",
    ):
        assert part in first_line
    layer.merge()
    assert "merged=True" in repr(layer)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("r", 0, ValueError),
        ("r", -1, ValueError),
        ("r", 2.0, TypeError),
        ("r", True, TypeError),
        ("lora_alpha", float("nan"), ValueError),
        ("lora_alpha", "16", TypeError),
        ("lora_dropout", 1.0, ValueError),
        ("lora_dropout", -0.1, ValueError),
        ("lora_dropout", None, TypeError),
        ("bias", "some", ValueError),
        ("bias", True, ValueError),
        ("adapter_dtype", torch.int8, TypeError),
        ("impl", "rocm", ValueError),
    ],
)
def test_a_bad_setting_is_named_and_the_linear_left_alone(argument, value, error):
    with pytest.raises(error, match=f"^{argument}: expected"):
        lk.LoRALinear(24, 16, **{argument: value})
    linear = nn.Linear(24, 16)
    before = {name: (p, p.detach().clone()) for name, p in linear.named_parameters()}
    with pytest.raises(error, match=f"^{argument}: expected"):
        lk.LoRALinear.from_linear(linear, **{argument: value})
    assert all(p.requires_grad for p in linear.parameters())
    for name, p in linear.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x).round()


def linear_with_replaced_forward():
    linear = nn.Linear(24, 16)
    linear.forward = torch.sin
    return linear


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: nn.Conv1d(24, 16, 1),
        lambda: lk.LoRALinear(24, 16),
        lambda: OwnForward(24, 16),
        linear_with_replaced_forward,
        lambda: nn.Linear(24, 16).to(torch.float8_e4m3fn),
    ],
    ids=["None", "Conv1d", "LoRALinear", "subclass", "instance forward", "float8"],
)
def test_what_is_no_plain_linear_is_refused_and_left_alone(make):
    linear = make()
    with pytest.raises(TypeError, match=r"^linear: expected"):
        lk.LoRALinear.from_linear(linear)
    if isinstance(linear, nn.Linear):
        assert all(p.requires_grad for p in linear.parameters())

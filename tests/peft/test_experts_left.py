"""Calls of experts that are left to PEFT, with the reason, and what PEFT refuses."""

import pytest
import torch
from torch import nn

import lora_kernels as lk
from tests.peft.test_experts import assert_same_block, block, layer_of, patched, use_of


def _hook(model):
    layer_of(model).base_layer.register_forward_hook(lambda *_: None)


def _hook_of_experts(model):
    layer_of(model).get_base_layer().register_forward_hook(lambda *_: None)


def _train_weights(model):
    layer_of(model).get_base_layer().gate_up_proj.requires_grad_()


def _implementation(model, name="batched_mm"):
    layer_of(model).get_base_layer().config._experts_implementation = name


def _parametrize(model):
    nn.utils.parametrize.register_parametrization(
        layer_of(model).get_base_layer(), "down_proj", nn.Identity()
    )


def _replace_forward(model):
    experts = layer_of(model).get_base_layer()
    experts.forward = experts.forward


def _swapped(model):
    layer_of(model)._did_swap_in_out_features = False


LEFT = {
    "a hook inside": (_hook, "its base_layer has hooks"),
    "a hook of the experts": (_hook_of_experts, "base layer has hooks"),
    "trained weights": (_train_weights, "base layer's gate_up_proj requires grad"),
    "expert parallel": (
        lambda m: setattr(layer_of(m).get_base_layer(), "_is_expert_parallel", True),
        "base layer is expert parallel",
    ),
    "another function of experts": (
        lambda m: _implementation(m, "sonicmoe"),
        "base layer has experts_implementation 'sonicmoe'",
    ),
    "a forward of its own": (_replace_forward, "base layer has hooks"),
    "the orientation before 0.19.1": (_swapped, "lora_A of down_proj acts on its outputs"),
    "a parametrization": (_parametrize, "base layer's down_proj is no parameter"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_left_to_peft_with_the_reason(case):
    change, reason = LEFT[case]
    model, _ = block()
    lk.patch_peft(model)
    assert use_of(model).state is None
    change(model)
    assert use_of(model).state.startswith(reason)


def _emptied(model):
    layer_of(model).lora_B["default"].weight.data = torch.empty(0)


def _without_memory(model):
    layer_of(model).lora_A["default"].weight.data.untyped_storage().resize_(0)


def test_factors_that_somebody_emptied_are_refused():
    model, given = block()
    lk.patch_peft(model)
    _emptied(model)
    assert "aren't of 5 experts" in use_of(model).state
    with pytest.raises(RuntimeError):  # PEFT's
        model(*given)
    model, given = block()
    lk.patch_peft(model)
    _without_memory(model)
    with pytest.raises((RuntimeError, ValueError), match="lora_A: expected memory"):
        model(*given)


def test_a_factor_of_inference_mode_among_several_is_pefts_to_refuse():
    """Joined with others it would be none any more, and trained beside."""
    plain, given = block(adapters=2)
    model = patched(plain)
    for each in (model, plain):
        each.base_model.set_adapter(["default", "a1"])
        own = layer_of(each).lora_B["a1"]
        with torch.inference_mode():
            weight = nn.Parameter(own.weight.clone(), requires_grad=False)
        own.weight = weight
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            each(*given)
        with torch.no_grad():
            each(*given)


def test_weights_of_inference_mode_are_peft_s_to_refuse():
    plain, given = block()
    model = patched(plain)
    with torch.inference_mode():
        weight = nn.Parameter(torch.randn(5, 16, 8), requires_grad=False)
    for each in (model, plain):
        layer_of(each).get_base_layer().down_proj = weight
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            each(*given)
    assert use_of(model).reason == "an inference tensor can't be saved for backward"


@pytest.mark.parametrize("change", [_hook, _hook_of_experts, _train_weights])
def test_what_is_left_computes_as_peft_does(change):
    plain, given = block()
    model = patched(plain)
    for each in (model, plain):
        change(each)
    assert_same_block(model, plain, given)
    assert use_of(model).left == 1


def test_batched_mm_is_cast_by_autocast_so_it_is_left_there():
    plain, given = block()
    model = patched(plain)
    for each in (model, plain):
        _implementation(each)
    assert_same_block(model, plain, given)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(*given), plain(*given))
    assert use_of(model).reason == "autocast casts its torch.float32 weights"


def test_x_of_another_dtype_is_batched_mm_s_to_refuse_and_grouped_mm_s_to_cast():
    plain, (x, ids, gates) = block()
    model = patched(plain)
    given = x.double(), ids, gates
    torch.testing.assert_close(model(*given), plain(*given), rtol=1e-4, atol=1e-5)
    assert use_of(model).fused == 1
    for each in (model, plain):
        _implementation(each)
        with pytest.raises(RuntimeError, match="expected scalar type"):
            each(*given)
    assert use_of(model).reason == "x is torch.float64, its weights torch.float32"


def test_bad_calls_are_peft_s_to_refuse():
    model, (x, ids, gates) = block()
    lk.patch_peft(model)
    torch.testing.assert_close(
        model.base_model.model.experts(x, top_k_index=ids, top_k_weights=gates),
        model(x, ids, gates),
    )
    assert use_of(model).fused == 2
    with pytest.raises(TypeError):
        model.base_model.model.experts(x, ids)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        model(x[:, :-1], ids, gates)
    assert use_of(model).left == 2

"""PEFT models over quantised weights, patched against PEFT's own: steps, states, files."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.quantized import read_quantized
from tests.support.quantised import TRANSFORMS, Net, adapted, is_served, results, transformed

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:Unmerge lora module")
KINDS = ("nf4", "fp4", "int8")
X = torch.linspace(-2, 2, 6 * 56).reshape(2, 3, 56)


def bytes_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_bytes(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype, key
        assert torch.equal(after[key], value), key


def assert_alike(patched, unpatched, x=X, rtol=1e-5):
    for ours, theirs in zip(results(patched, x), results(unpatched, x), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= rtol * theirs.abs().max()


def pairs(kind, **how):
    return adapted(kind, **how), adapted(kind, patched=False, **how)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_peft_s(kind):
    ours, theirs = pairs(kind)
    assert_alike(ours, theirs)
    used = lk.report(ours)
    assert all((use.fused, use.left, use.state) == (1, 0, None) for use in used.layers.values())
    assert f"weights in {kind}" in str(used)
    # In 16 bits PEFT computes the branch in the adapters' float32, ours in the layer's own dtype.
    for model in (ours, theirs):
        model.to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    if kind != "int8":
        assert_alike(ours, theirs, X.bfloat16(), rtol=3e-2)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_other_storage(nested, storage):
    assert_alike(*pairs("nf4", nested=nested, storage=storage))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compute_dtype_casts_in_and_out(dtype):
    ours, theirs = pairs("nf4", dtype=dtype)
    before = bytes_of(ours)
    assert_alike(ours, theirs, rtol=3e-2)
    assert_bytes(ours, before)  # bitsandbytes casts the bias in place
    assert ours(X).dtype == X.dtype


def test_the_first_input_sets_an_open_compute_dtype():
    ours, theirs = pairs("nf4")
    for model in (ours, theirs):
        model(X.bfloat16())
    layers = [m.base_model.model.a.base_layer for m in (ours, theirs)]
    assert [layer.compute_dtype for layer in layers] == [torch.bfloat16] * 2
    assert_alike(ours, theirs, rtol=3e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    ours, theirs = pairs(kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert_alike(ours, theirs, rtol=3e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_training_keeps_every_byte_of_the_weights(kind):
    ours, theirs = pairs(kind, dropout=0.0)
    frozen = {k: v for k, v in bytes_of(ours).items() if "lora_" not in k}
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        losses.append([])
        for _ in range(50):
            optimizer.zero_grad()
            loss = (model(X) - X).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    after = ours.state_dict()
    assert all(torch.equal(after[key], value) for key, value in frozen.items())


def convertible(model):
    """Let bitsandbytes' layers convert their weights for inference, as on an AVX512_BF16 CPU."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    return model


STATES = ("fused", "disabled", "merged", "two adapters", "called with more")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_training_after_an_evaluation(kind, state):
    """Nothing rewrites the weight, where bitsandbytes' own forward would on some CPUs."""
    ours, theirs = pairs(kind)
    convertible(ours)
    before, wanted = bytes_of(ours), results(theirs, X)
    names = ["__base__", "default"] if state == "called with more" else None
    ours.eval()
    with torch.no_grad():
        if state == "disabled":
            with ours.disable_adapter():
                ours(X)
        elif state == "merged":
            ours.merge_adapter()
            merged = bytes_of(ours)
            ours(X)
            assert_bytes(ours, merged)
            return
        elif state == "two adapters":
            ours.add_adapter("second", ours.peft_config["default"])
            ours.base_model.set_adapter(["default", "second"])
            ours(X)
            ours.set_adapter("default")
            ours.delete_adapter("second")
        elif names:
            ours(X, adapter_names=names)
        else:
            ours(X)
    ours.train()
    assert_bytes(ours, before)
    for a, b in zip(results(ours, X), wanted, strict=True):
        torch.testing.assert_close(a, b)
    flags = [vars(m).get("support_avx512bf16_for_cpu", True) for m in ours.modules()]
    assert all(flags)


def test_a_converted_weight_is_left_and_said():
    model = adapted("nf4")
    layer = model.base_model.model.a.base_layer
    layer.weight.quant_state.packing_format_for_cpu = True
    use = lk.report(model).layers["base_model.model.a"]
    assert "was converted in place for inference on a CPU" in use.state
    with pytest.raises(ValueError, match=r"owner: .*its weight was converted in place"):
        lk.quantized_weight(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_disabled(kind):
    ours, theirs = pairs(kind)
    for model in (ours, theirs):
        with model.disable_adapter():
            assert not any(p.grad is not None for p in model.parameters())
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(X), theirs(X))
        x = X.clone().requires_grad_()
        ours(x).sum().backward()
        assert x.grad.any()
    for model in (ours, theirs):
        model.merge_adapter()
    torch.testing.assert_close(ours(X), theirs(X))
    states = {use.state for use in lk.report(ours).layers.values()}
    assert states == {"merged: default"}
    for model in (ours, theirs):
        model.unmerge_adapter()
    assert_alike(ours, theirs)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


def test_disabled_while_merged_unmerges_as_peft_does():
    ours, theirs = pairs("nf4")
    for model in (ours, theirs):
        model.merge_adapter()
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(X), theirs(X))
    assert not ours.base_model.model.a.merged


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_several_adapters(kind):
    ours, theirs = pairs(kind)
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.add_adapter("second", model.peft_config["default"])
        model.set_adapter("second")
    assert_alike(ours, theirs)
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "second"])
    assert_alike(ours, theirs)
    assert not lk.report(ours).layers["base_model.model.a"].state


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_copies_files_and_unpatching(kind, tmp_path):
    ours, theirs = pairs(kind)
    wanted = ours(X)
    torch.testing.assert_close(copy.deepcopy(ours)(X), wanted)
    torch.testing.assert_close(pickle.loads(pickle.dumps(ours.base_model.model.a))(X),
                               theirs.base_model.model.a(X))  # fmt: skip
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Net(kind), tmp_path)
    lk.patch_peft(again)
    torch.testing.assert_close(again(X), wanted)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    assert_bytes(theirs, bytes_of(ours))
    kinds = [type(theirs.base_model.model.a), type(ours.base_model.model.a)]
    assert lk.unpatch_peft(ours) == 2
    assert type(ours.base_model.model.a) is kinds[0] is not kinds[1]
    assert not any(name.startswith("_lora_kernels") for m in ours.modules() for name in vars(m))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_compiled_and_exported(kind):
    ours, theirs = pairs(kind)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_alike(compiled, theirs)
    if kind == "int8":
        return  # its scales hang on the parameter, in whose place torch.export puts another
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    program = torch.export.export(ours, (X,))
    assert any("lora_linear" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(X), theirs(X))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    ours, theirs = pairs("nf4")

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ours

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    assert_alike(Checkpointed(), theirs)


def test_dropout_is_drawn_again_from_a_seed():
    model = adapted("nf4", dropout=0.5)
    torch.manual_seed(5)
    first = results(model, X)
    torch.manual_seed(5)
    assert all(map(torch.equal, first, results(model, X)))
    assert not torch.equal(first[0], model.eval()(X))


@pytest.mark.parametrize("kind", KINDS)
def test_loralinear_around_a_quantised_layer(kind):
    base = Net(kind).a
    frozen = base.weight.clone()
    layer = lk.LoRALinear.from_linear(base, r=4)
    nn.init.normal_(layer.lora_B.weight)
    y = layer(X)
    assert layer.lora_A.weight.dtype == torch.float32
    wanted = base(X) + layer.lora_B(layer.lora_A(X)) * layer.scaling
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    assert layer.lora_A.weight.grad.any()
    assert torch.equal(base.weight, frozen)
    assert is_served(lk.report(layer).layers[""].impl, kind)
    with pytest.raises(TypeError, match=r"base_layer.weight: expected a float parameter to merge"):
        layer.merge()
    assert layer.weight is base.weight


def test_loralinear_that_is_left_keeps_the_weight():
    net = convertible(Net("nf4"))
    layer = lk.LoRALinear.from_linear(net.a, r=4).eval()
    before = bytes_of(layer)
    layer.lora_A.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        layer(X)
    assert lk.report(layer).layers[""].left == 1
    assert_bytes(layer, before)
    assert net.a.support_avx512bf16_for_cpu


def test_what_is_not_quantised_yet_is_named():
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for kind, how in ((Linear4bit, {}), (Linear8bitLt, {"has_fp16_weights": False})):
        layer = kind(8, 4, **how).requires_grad_(False)
        with pytest.raises(ValueError, match=r"owner: .*its weight is not quantised yet"):
            lk.quantized_weight(layer)
        with pytest.raises(TypeError, match=r"linear: .*its weight is not quantised yet"):
            lk.LoRALinear.from_linear(layer)
    with pytest.raises(ValueError, match="its weight is kept in 16 bits"):
        lk.quantized_weight(Linear8bitLt(8, 4))
    with pytest.raises(TypeError, match=r"owner: expected a quantised layer .*got a Parameter"):
        lk.quantized_weight(nn.Linear(4, 4).weight)


def test_bad_states_are_named_and_nothing_is_written():
    bad = {
        "is fp5 of shape": lambda layer, state: setattr(state, "quant_type", "fp5"),
        "weight is \\[56, 40\\], not \\[40, 56\\]": lambda layer, state: setattr(
            state, "shape", torch.Size((56, 40))
        ),
        "expected 1120 elements of codes": lambda layer, state: setattr(
            layer.weight, "data", layer.weight.data[1:]
        ),
        "nested blocks of 128 scales": lambda layer, state: setattr(state.state2, "blocksize", 128),
        "its scales on meta": lambda layer, state: setattr(
            state, "absmax", state.absmax.to("meta")
        ),
        "lacks its memory": lambda layer, state: state.absmax.untyped_storage().resize_(0),
        "has hooks": lambda layer, state: layer.register_forward_hook(lambda *_: None),
    }
    for message, spoil in bad.items():
        model = adapted("nf4")
        layer = model.base_model.model.a.base_layer
        spoil(layer, layer.weight.quant_state)
        state = lk.report(model).layers["base_model.model.a"].state
        assert state.startswith("base layer ")
        assert pytest.importorskip("re").search(message, state), state
    state = Net("nf4").a
    state.weight.quant_state = None  # FSDP loses it, and the module has it
    assert read_quantized(state).weight.format == "nf4"


@pytest.mark.parametrize(("kind", "how"), [(k, how) for k in TRANSFORMS for how in TRANSFORMS[k]])
def test_transforms_and_traces_are_peft_s(kind, how):
    ours, theirs = (model.base_model.model.a for model in pairs(kind))
    found, expected = transformed(ours, X, how), transformed(theirs, X, how)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if how in ("vmap", "trace"):
        for layer in (ours, theirs):
            layer.enable_adapters(False)
        torch.testing.assert_close(transformed(ours, X, how), transformed(theirs, X, how))


@pytest.mark.parametrize(("kind", "how"), [(k, how) for k in TRANSFORMS for how in TRANSFORMS[k]])
def test_transforms_of_a_module_are_those_of_its_parts(kind, how):
    layer = lk.LoRALinear.from_linear(Net(kind).a, r=4)
    nn.init.normal_(layer.lora_B.weight)
    composed = copy.deepcopy(layer)
    composed.base_layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(transformed(layer, X, how), transformed(composed, X, how))


def test_options_are_checked():
    with pytest.raises(ValueError, match='int8: expected None or "weights", got True'):
        lk.patch_peft(adapted("int8", patched=False), int8=True)
    model = adapted("int8", patched=False)
    with pytest.raises(ValueError, match=r"impl: .*got 'cuda': reads weights of format dense"):
        lk.patch_peft(model, impl="cuda")
    assert lk.unpatch_peft(model) == 0


def test_prepacking_leaves_codes_alone():
    model = adapted("nf4", patched=False)
    found = lk.patch_peft(model, prepack=True).prepack
    assert not found.packed
    assert len(found.left) == 2

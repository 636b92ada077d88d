"""Packed weights: the same results, dropped when the weight changes, unseen by what saves."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lora_kernels as lk
from lora_kernels import prepack
from lora_kernels.impl.eager.onednn import CHAIN, parts
from lora_kernels.native import absence
from lora_kernels.operands.onednn import OnednnWeight
from lora_kernels.registration import operators
from lora_kernels.testing import Case, assert_results, make_inputs

needs_packing = pytest.mark.skipif(
    absence("cpu") is not None or not torch.backends.mkldnn.is_available(),
    reason=f"needs the compiled CPU part ({absence('cpu') or 'there'}) and oneDNN",
)
PACKED = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            reason="oneDNN packs no bfloat16 on this processor",
        ),
    ),
]


def make_model(dtype=torch.float32, **settings):
    model = nn.Sequential(
        lk.LoRALinear(48, 64, r=8, lora_alpha=12, dtype=dtype, **settings),
        nn.ReLU(),
        lk.LoRALinear(64, 40, r=5, dtype=dtype, **settings),
    )
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    return model


def gradients(model, x, dy):
    leaves = [x.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def packed(model):
    return [m._lora_kernels_packed is not None for m in (model[0], model[2])]


@needs_packing
@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 16, 130])
@pytest.mark.parametrize("backward", [True, False], ids=["both", "forward"])
def test_results_are_those_of_the_weight(dtype, rows, backward):
    model = make_model(dtype)
    x, dy = torch.randn(2, rows, 48).to(dtype), torch.randn(2, rows, 40).to(dtype)
    expected = gradients(model, x, dy)
    report = lk.prepack_(model, backward=backward)
    assert report.packed == ["0", "2"]
    assert not report.left
    nbytes = sum(layer.base_layer.weight.nbytes for layer in (model[0], model[2]))
    assert nbytes * (1 + backward) <= report.nbytes <= 2 * nbytes * (1 + backward)
    results = gradients(model, x, dy)
    assert packed(model) == [True, True]
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value)
    assert lk.unprepack_(model) == 2
    assert packed(model) == [False, False]


@needs_packing
@pytest.mark.parametrize("dtype", PACKED, ids=str)
@pytest.mark.parametrize("rows", [3, 17, 130])
def test_long_sums_are_within_the_budget(dtype, rows):
    case = Case((rows,), 1030, 1100, 8, dtype, bias=False, scaling=1.0)
    inputs = make_inputs(case)
    linear = nn.Linear(1100, 1030, bias=False, dtype=dtype)
    layer = lk.LoRALinear.from_linear(linear, r=8, lora_alpha=8)
    with torch.no_grad():
        layer.base_layer.weight.copy_(inputs.weight)
        layer.lora_A.weight.copy_(inputs.lora_A)
        layer.lora_B.weight.copy_(inputs.lora_B)
    lk.prepack_(layer)
    results = gradients(layer, inputs.x, inputs.dy)
    assert layer._lora_kernels_packed is not None
    named = dict(zip(("y", "dx", "da", "db"), results, strict=True))
    assert_results(case, inputs, named, "cpu")


@pytest.mark.parametrize("depth", [1, CHAIN, CHAIN + 1, 1100])
def test_parts_of_float32_sums_are_short_and_all_there(depth):
    weight = torch.randn(24, depth)
    for w in (weight, weight.t().contiguous().t()):
        found = list(parts(w))
        assert [start for start, _ in found] == [depth * i // len(found) for i in range(len(found))]
        assert max(part.shape[1] for _, part in found) <= CHAIN
        assert torch.equal(torch.cat([part for _, part in found], 1), w)
    assert len(list(parts(weight.bfloat16()))) == 1


def _in_place(model):
    with torch.no_grad():
        model[0].base_layer.weight.mul_(2)


def _replaced(model):
    model[0].base_layer.weight = nn.Parameter(torch.randn(64, 48), requires_grad=False)


def _other_memory(model):
    model[0].base_layer.weight.data = torch.randn(64, 48)


def _moved(model):
    model.to(torch.float64)


def _loaded(model):
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})


@needs_packing
@pytest.mark.parametrize("change", [_in_place, _replaced, _other_memory, _moved, _loaded])
def test_a_changed_weight_is_used_and_the_copy_dropped(change):
    model = make_model()
    lk.prepack_(model)
    change(model)
    x = torch.randn(5, 48, dtype=model[0].base_layer.weight.dtype)
    layer = model[0]
    y = layer(x)
    assert layer._lora_kernels_packed is None
    a, b = layer.lora_A.weight, layer.lora_B.weight
    expected = nn.functional.linear(x, layer.base_layer.weight, layer.bias) + 1.5 * x @ a.T @ b.T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@needs_packing
def test_a_packed_weight_outlives_a_merge():
    model, x = make_model(), torch.randn(5, 48)
    lk.prepack_(model)
    expected = model(x)
    model[0].merge()
    torch.testing.assert_close(model(x), expected)
    model[0].unmerge()
    assert torch.equal(model(x), expected)
    assert packed(model) == [True, True]


@needs_packing
def test_saving_and_copying_do_not_see_it():
    model = make_model()
    before, names = model.state_dict(), dict(model.named_parameters()).keys()
    lk.prepack_(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert dict(model.named_parameters()).keys() == names
    assert not any(t.is_mkldnn for t in model.buffers())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(3, 48)
    expected = model(x)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert packed(other) == [False, False]
        torch.testing.assert_close(other(x), expected)
    assert packed(model) == [True, True]


@needs_packing
def test_a_named_implementation_and_autocast_do_not_take_it():
    for settings in ({"impl": "reference"}, {"impl": "eager"}):
        model = make_model(**settings)
        x = torch.randn(5, 48)
        expected = model(x)
        lk.prepack_(model)
        assert torch.equal(model(x), expected)
    model = make_model()
    lk.prepack_(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(5, 48)).dtype == torch.bfloat16


@needs_packing
def test_compiled_graphs_take_the_weight_itself():
    model = make_model()
    x = torch.randn(5, 48)
    expected = model(x)
    lk.prepack_(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


@needs_packing
def test_layers_that_are_left_say_why():
    model = make_model(dtype=torch.float64)
    model.append(lk.LoRALinear(40, 8))
    model[3].base_layer.weight.requires_grad_()
    report = lk.prepack_(model)
    assert not report.packed
    assert "float64" in report.left["0"]
    assert "not frozen" in report.left["3"]
    assert "0 weights packed in 0.0 MiB, 3 left" in str(report)


def _emptied(base):
    base.weight.data = torch.empty(0)


def _without_memory(base):
    base.weight.untyped_storage().resize_(0)


def _sparse(base):
    base.weight = nn.Parameter(base.weight.detach().to_sparse_csr(), requires_grad=False)


def _dynamically_quantised(base):
    return torch.ao.nn.quantized.dynamic.Linear(48, 64)


@needs_packing
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_emptied, "the weight has shape [0]"),
        (_without_memory, "expected memory for shape [64, 48], got a storage of 0 bytes"),
        (_sparse, "base layer weight is torch.float32, torch.sparse_csr"),
        (lambda base: base.to("meta") and None, "the weight is on meta, not a CPU"),
        (_dynamically_quantised, "base layer is Linear, not torch.nn.Linear"),
        (
            lambda base: nn.utils.parametrizations.weight_norm(base),
            "base layer is ParametrizedLinear, not torch.nn.Linear",
        ),
        (lambda base: prune.l1_unstructured(base, "weight", 5) and None, "base layer has hooks"),
    ],
)
def test_weights_that_are_not_plain_are_left(change, reason):
    model = make_model()
    model[0].base_layer = change(model[0].base_layer) or model[0].base_layer
    report = lk.prepack_(model)
    assert report.packed == ["2"]
    assert reason in report.left["0"]
    assert packed(model) == [False, True]


def test_without_the_compiled_part_everything_is_left(monkeypatch):
    monkeypatch.setattr(prepack, "absence", lambda part: "left out by this test")
    model = make_model()
    report = lk.prepack_(model)
    assert report.left.keys() == {"0", "2"}
    assert "left out by this test" in report.left["0"]
    model(torch.randn(5, 48))


def test_models_without_adapted_layers_are_an_error():
    with pytest.raises(ValueError, match="model: expected one with LoRALinear layers"):
        lk.prepack_(nn.Linear(3, 4))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        lk.prepack_(3)
    assert lk.unprepack_(nn.Linear(3, 4)) == 0


@needs_packing
def test_patched_peft_layers():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40)), config
    )
    x = torch.randn(9, 48)
    expected = model(x)
    report = lk.patch_peft(model, prepack=True)
    assert len(report.prepack.packed) == 2
    assert "2 weights packed" in str(report)
    torch.testing.assert_close(model(x), expected)
    layers = [m for m in model.modules() if hasattr(m, "_lora_kernels_packed")]
    assert all(layer._lora_kernels_packed for layer in layers)
    model.merge_adapter()  # writes through .data
    assert not any(layer._lora_kernels_packed for layer in layers)
    assert "weight copies (lost: merged, they come back with unmerge())" in str(lk.report(model))
    model.unmerge_adapter()
    assert all(layer._lora_kernels_packed for layer in layers)
    torch.testing.assert_close(model(x), expected)
    lk.prepack_(model)
    lk.unpatch_peft(model)
    assert not any("_lora_kernels_packed" in vars(layer) for layer in layers)
    torch.testing.assert_close(model(x), expected)


@needs_packing
def test_a_peft_layer_packed_while_it_is_merged():
    """PEFT's unmerge writes through .data: the copies made before would be the merged weight's."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(48, 64)), config)
    x = torch.randn(9, 48)
    expected = model(x)
    model.merge_adapter()
    lk.patch_peft(model, prepack=True)
    model.unmerge_adapter()
    assert all(m._lora_kernels_packed for m in model.modules() if hasattr(m, "_lora_kernels_calls"))
    torch.testing.assert_close(model(x), expected)


@needs_packing
def test_a_weight_that_is_trained_is_not_held():
    """Fused optimizers don't move its version."""
    results = []
    for pack in (True, False):
        torch.manual_seed(0)
        layer, x = lk.LoRALinear(24, 24, r=4), torch.randn(6, 24)
        if pack:
            lk.prepack_(layer)
        layer.base_layer.weight.requires_grad_()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
        results.append(layer(x))
    torch.testing.assert_close(*results)


@needs_packing
def test_a_processor_without_packed_bfloat16_is_said(monkeypatch):
    model = make_model(torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    report = lk.prepack_(model)
    assert not report.packed
    assert set(report.left) == {"0", "2"}
    assert "no bfloat16 on this processor" in str(report)


@needs_packing
def test_an_operator_under_autocast_reads_the_weight_itself():
    x, w = torch.randn(3, 48), torch.randn(40, 48)
    a, b = torch.randn(4, 48), torch.randn(40, 4)
    copies = OnednnWeight(w, backward=False).tensors(backward=False)[1]
    operator = operators("lora_linear", "cpu").forward
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = operator(x, w, copies, "onednn", a, b, None, None, 0, None, 1.0)
    expected, _ = operator(x.bfloat16(), w.bfloat16(), None, None, a, b, None, None, 0, None, 1.0)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_a_packed_weight_that_became_an_inference_tensor_is_not_held():
    """It has no version to compare: the call reads it as it is, or is left where it is recorded."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 48)), config)
    assert lk.patch_peft(model, prepack=True).prepack.packed
    base, x = model.base_model.model[0].base_layer, torch.randn(5, 64)
    with torch.inference_mode():
        base.weight = nn.Parameter(torch.randn(48, 64), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(model(x), x @ base.weight.T + base.bias)


@needs_packing
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cast", [False, True], ids=["packed", "cast and packed"])
def test_an_adapter_of_dora_beside_packed_copies(cast, autocast):
    """Packing leaves layers of DoRA, and this one is DoRA's only later."""
    peft = pytest.importorskip("peft")
    how = {"r": 4, "target_modules": ["0"], "init_lora_weights": False}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 8)), peft.LoraConfig(**how))
    other = copy.deepcopy(model)
    lk.patch_peft(other, cast_weights=cast, prepack=True)
    assert other.base_model.model[0]._lora_kernels_packed is not None
    for each in (model, other):
        torch.manual_seed(1)
        each.add_adapter("dora", peft.LoraConfig(use_dora=True, **how))
        each.set_adapter("dora")
    x, found = torch.randn(5, 16), []
    for each in (model, other):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = each(x)
            with torch.no_grad():
                alone = each(x)
        leaves = [p for p in each.parameters() if p.requires_grad]
        found.append([y, alone, *torch.autograd.grad(y.float().square().sum(), leaves)])
    tolerance = {"rtol": 0.05, "atol": 0.2} if autocast else {}
    torch.testing.assert_close(found[1], found[0], **tolerance)

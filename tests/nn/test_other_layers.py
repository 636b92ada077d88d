"""LoRAEmbedding and LoRAConv1d, 2d, 3d: names, results, merging, fallbacks, bad arguments."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.native import absence

F64 = torch.float64
CONVS = {
    1: (nn.Conv1d, lk.LoRAConv1d),
    2: (nn.Conv2d, lk.LoRAConv2d),
    3: (nn.Conv3d, lk.LoRAConv3d),
}


def make_embedding(**settings):
    base = nn.Embedding(11, 6, padding_idx=4, dtype=F64)
    layer = lk.LoRAEmbedding.from_embedding(base, r=3, lora_alpha=6, **settings)
    nn.init.normal_(layer.lora_embedding_A)
    return layer, torch.arange(22).reshape(2, 11) % 11


def make_conv(dims=2, groups=1, **settings):
    base = CONVS[dims][0](4, 6, 3, stride=2, padding=1, groups=groups, dtype=F64)
    layer = CONVS[dims][1].from_conv(base, r=2, lora_alpha=3, **settings)
    nn.init.normal_(layer.lora_B.weight)
    return layer, torch.randn(2, 4, *(5, 6, 7)[:dims], dtype=F64)


MAKERS = {
    "embedding": make_embedding,
    **{f"conv{dims}d": lambda dims=dims: make_conv(dims) for dims in CONVS},
}
each = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def composed(layer, x):
    """What a hooked layer computes, by its submodules' own calls."""
    other = copy.deepcopy(layer)
    other.base_layer.register_forward_hook(lambda *_: None)
    assert other.left_reason() is not None
    return other(x)


def pefts(layer):
    """PEFT's layer of the same parameters, by name."""
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(layer.base_layer)
    config = peft.LoraConfig(
        r=layer.r, lora_alpha=layer.lora_alpha, target_modules=["0"], init_lora_weights=False
    )
    model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).double()
    theirs = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                theirs[f"base_model.model.0.{name}"].copy_(parameter)
    return model


@each
def test_parameters_and_results_are_pefts(make):
    layer, x = make()
    model = pefts(layer)
    y, theirs = layer(x), model(x)
    torch.testing.assert_close(y, theirs, rtol=1e-13, atol=1e-13)
    y.square().sum().backward()
    theirs.square().sum().backward()
    trained = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    others = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(others) == 2
    torch.testing.assert_close(list(trained.values()), others)
    assert layer.base_layer.weight.grad is None


@each
def test_a_hook_gets_its_call(make):
    layer, x = make()
    assert layer.left_reason() is None
    torch.testing.assert_close(composed(layer, x), layer(x))


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_a_bias_of_a_factor_is_seen(name):
    layer, x = make_conv()
    factor = getattr(layer, name)
    factor.bias = nn.Parameter(torch.randn(factor.out_channels, dtype=F64))
    torch.testing.assert_close(layer(x), composed(layer, x))
    assert layer.left_reason() == "lora_A or lora_B has a bias"
    with pytest.raises(TypeError, match="expected no bias to merge"):
        layer.merge()
    assert not layer.merged


@each
def test_shapes_on_meta_and_graphs_of_fx(make):
    layer, x = make()
    expected = layer(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), expected)
    y = layer.to("meta")(x.to("meta"))
    assert (y.shape, y.dtype, y.device.type) == (expected.shape, F64, "meta")


@each
def test_merging_changes_no_result_and_comes_undone(make):
    layer, x = make()
    y, own = layer(x), layer.base_layer.weight
    before = own.detach().clone()
    layer.merge()
    assert layer.merged
    assert not torch.equal(layer.base_layer.weight, before)
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.base_layer(x), y)
    layer.unmerge()
    assert layer.base_layer.weight is own
    assert torch.equal(own, before)
    assert not layer.merged


@each
def test_copies_and_pickles(make):
    layer, x = make()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert type(other) is type(layer)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("make", [make_embedding, make_conv])
def test_a_compiled_layer(make):
    layer, x = make()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_new_layer_computes_its_base_layer():
    table = lk.LoRAEmbedding(7, 5, r=2, padding_idx=3)
    ids = torch.arange(7)
    assert torch.equal(table(ids), table.base_layer(ids))
    assert table.lora_embedding_B.any()
    for dims, (_, kind) in CONVS.items():
        layer = kind(3, 4, 3, stride=1, padding="same", r=2, lora_dropout=0.5)
        x = torch.randn(1, 3, *[5] * dims)
        torch.testing.assert_close(layer(x), layer.base_layer(x))
        assert layer.lora_A.weight.any()


def test_dropout_only_in_training():
    layer, x = make_conv(lora_dropout=0.5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), composed(layer, x))


def test_rank_stabilised_scaling_and_trained_bias():
    layer, _ = make_conv(bias="all", use_rslora=True)
    assert layer.scaling == 3 / 2**0.5
    assert layer.base_layer.bias.requires_grad
    assert not make_conv()[0].base_layer.bias.requires_grad


def test_grouped_convolutions_compute_and_do_not_merge():
    layer, x = make_conv(groups=2)
    torch.testing.assert_close(layer(x), pefts(layer)(x))
    with pytest.raises(ValueError, match="base_layer: expected one group to merge, got 2"):
        layer.merge()
    assert not layer.merged


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2


EMBEDDINGS = {
    "linear": (nn.Linear(3, 3), "is Linear, not torch.nn.Embedding"),
    "subclass": (Scaled(4, 3), "is Scaled, not torch.nn.Embedding"),
    "max_norm": (nn.Embedding(4, 3, max_norm=1.0), "has max_norm"),
    "sparse": (nn.Embedding(4, 3, sparse=True), "has sparse"),
    "frequencies": (nn.Embedding(4, 3, scale_grad_by_freq=True), "has scale_grad_by_freq"),
    "integer": (
        nn.Embedding.from_pretrained(torch.zeros(4, 3, dtype=torch.int32)),
        "weight is torch.int32",
    ),
}


@pytest.mark.parametrize(("base", "message"), EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_embeddings_that_are_left_are_named(base, message):
    frozen = [p.requires_grad for p in base.parameters()]
    with pytest.raises(TypeError, match=f"embedding: expected a torch.nn.Embedding.*{message}"):
        lk.LoRAEmbedding.from_embedding(base)
    assert [p.requires_grad for p in base.parameters()] == frozen


REFUSED = {
    "dilation": (nn.Conv2d(4, 4, 3, dilation=2), TypeError, r"has dilation \(2, 2\), which PEFT's"),
    "reflect": (
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), TypeError, "padding_mode 'reflect'",
    ),
    "dimensions": (nn.Conv1d(4, 4, 3), TypeError, r"is Conv1d, not torch\.nn\.Conv2d"),
    "transposed": (nn.ConvTranspose2d(4, 4, 3), TypeError, "is ConvTranspose2d, not"),
    "groups": (nn.Conv2d(6, 6, 3, groups=3), ValueError, "r: expected a multiple of groups, 3"),
}  # fmt: skip


@pytest.mark.parametrize(("base", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_convolutions_that_are_left_are_named(base, error, message):
    with pytest.raises(error, match=message):
        lk.LoRAConv2d.from_conv(base, r=4)
    assert base.weight.requires_grad


@pytest.mark.parametrize("make", [lk.LoRAEmbedding, lk.LoRAConv2d])
def test_settings_are_checked(make):
    sizes = (4, 4) if make is lk.LoRAEmbedding else (4, 4, 3)
    for wrong, message in (
        ({"r": 0}, "r: expected a rank"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite"),
        ({"impl": "gpu"}, "impl: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            make(*sizes, **wrong)


@each
def test_no_adapter_is_left_out_of_a_file(make, tmp_path):
    model, other = (nn.Sequential(lk.LoRALinear(4, 4, r=1), make()[0]) for _ in range(2))
    lk.save_adapter(model, tmp_path)
    lk.load_adapter(other, tmp_path)
    assert other[1].scaling == model[1].scaling
    for (name, mine), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs) == ("lora_" in name), name


@each
def test_the_report_counts_calls_and_names_what_runs_them(make):
    layer, x = make()
    model = nn.ModuleDict({"it": layer, "DoRA": lk.LoRALinear(4, 4, use_dora=True)})
    layer(x)
    model["DoRA"](torch.ones(1, 4))
    use = lk.report(model).layers["it"]
    assert (use.fused, use.left, use.state, use.impl) == (1, 0, None, "eager")
    dora = lk.report(model).layers["DoRA"]
    assert dora.fused == 1
    assert dora.impl.startswith("eager" if absence("cpu") else "cpu (")
    assert (dora.without_kernel is None) == (absence("cpu") is None)
    layer.base_layer.register_forward_hook(lambda *_: None)
    layer(x)
    use = lk.report(model).layers["it"]
    assert (use.fused, use.left) == (1, 1)
    assert use.state == use.reason != ""
    assert "has hooks" in use.state
    layer.base_layer._forward_hooks.clear()
    layer.merge()
    layer(x)  # which needs no adapter
    use = lk.report(model).layers["it"]
    assert (use.fused, use.left, use.state, use.impl) == (1, 1, "merged", None)

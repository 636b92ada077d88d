"""Batches of several adapters, patched: PEFT's adapter_names, and adapter_batch in training."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.native import absence
from tests.stacks.models import adapted_llama, lora_config, randomize

peft = pytest.importorskip("peft")
NAMES = ["second", "default", "__base__", "default", "third", "second"]


# Named: "auto" leaves so few rows to PEFT.
IMPL = "eager" if absence("cpu") else "cpu"


def model_of(dtype=torch.float32, **lora):
    """A llama with three adapters, of ranks 4, 2 and 8; the third adapts fewer layers."""
    model = adapted_llama(r=4, **lora)
    model.add_adapter("second", lora_config(r=2, **lora))
    model.add_adapter("third", lora_config(r=8, lora_alpha=3, target_modules=["q_proj"], **lora))
    return randomize(model).to(dtype)


@pytest.fixture
def pair():
    plain = model_of().eval()
    model = copy.deepcopy(plain)
    lk.patch_peft(model, impl=IMPL)
    return model, plain


def tokens(count=6, length=5):
    return torch.randint(0, 40, (count, length))


@pytest.mark.parametrize("grad", [True, False])
def test_adapter_names_give_peft_s_outputs(pair, grad):
    model, _ = pair
    ids = tokens()
    with torch.set_grad_enabled(grad):
        got, expected = (m(input_ids=ids, adapter_names=NAMES).logits for m in pair)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    use = lk.report(model).layers
    assert all(each.fused == 1 and not each.left for each in use.values())


def test_each_sample_is_as_alone(pair):
    model, _ = pair
    ids = tokens()
    together = model(input_ids=ids, adapter_names=NAMES).logits
    for i, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(input_ids=ids[i : i + 1]).logits
        else:
            model.set_adapter(name)
            alone = model(input_ids=ids[i : i + 1]).logits
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_generation_and_wrong_names_are_peft_s(pair):
    model, _ = pair
    ids = tokens(6, 3)
    how = {"adapter_names": NAMES, "max_new_tokens": 4, "do_sample": False}
    got, expected = (m.generate(input_ids=ids, **how) for m in pair)
    assert got.equal(expected)
    for names in (["nobody"] * 6, NAMES[:-1]):
        for each in pair:
            with pytest.raises(ValueError, match=r"nobody|Length of `adapter_names`"):
                each(input_ids=ids, adapter_names=names)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(input_ids=ids, adapter_names=NAMES)


def trained(model, names, ids, batch):
    """Return the loss of all samples and the gradients of all adapters."""
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    model.zero_grad()
    if batch:
        with lk.adapter_batch(model, names):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
    else:
        losses = []
        for i, name in enumerate(names):
            model.base_model.disable_adapter_layers() if name == "__base__" else (
                model.base_model.enable_adapter_layers(),
                model.base_model.set_adapter(name),
            )
            for key, p in model.named_parameters():
                p.requires_grad_("lora_" in key)
            losses.append(model(input_ids=ids[i : i + 1], labels=ids[i : i + 1]).loss / len(names))
            if losses[-1].requires_grad:
                losses[-1].backward()
        model.base_model.enable_adapter_layers()
        loss = sum(losses)
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_training_a_mixed_batch_equals_separate_runs(pair, checkpointing):
    model, plain = (each.train() for each in pair)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    ids = tokens()
    (loss, grads), (expected, others) = (
        trained(each, NAMES, ids, each is model) for each in (model, plain)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    for name, grad in others.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-4 * scale)
    assert {n.split(".")[-2] for n in others} == {"default", "second", "third"}


def test_disabled_adapters_are_the_base_model(pair):
    model, plain = pair
    ids = tokens()
    with lk.adapter_batch(model, NAMES), model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_dropout_has_a_mask_a_row_and_is_redrawn_alike():
    model = model_of(lora_dropout=0.5).train()
    lk.patch_peft(model)
    ids, losses = tokens(), []
    for _ in range(2):
        torch.manual_seed(3)
        with lk.adapter_batch(model, NAMES):
            losses.append(model(input_ids=ids, labels=ids).loss)
    assert losses[0] == losses[1]
    with lk.adapter_batch(model, NAMES):
        assert model(input_ids=ids, labels=ids).loss != losses[0]


def test_bfloat16_and_autocast():
    model = model_of().eval()
    plain = copy.deepcopy(model)
    lk.patch_peft(model, impl=IMPL)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (
            m(input_ids=tokens() * 0 + 3, adapter_names=NAMES).logits for m in (model, plain)
        )
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_outside_the_block_everything_is_as_before(pair):
    model, plain = pair
    ids = tokens()
    with pytest.raises(RuntimeError, match="mine"), lk.adapter_batch(model, NAMES):
        raise RuntimeError("mine")
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not any("_lora_kernels_batch" in vars(m) for m in model.modules())


def _embeddings(model):
    model.add_adapter("fourth", lora_config(target_modules=["embed_tokens"]))


def _saved(model):
    model.add_adapter("fourth", lora_config(modules_to_save=["lm_head"]))
    model.set_adapter("fourth")


def _tokens_trained(model):
    model.add_adapter("fourth", lora_config(trainable_token_indices=[1]))


def _to_double(name, parameter):
    if "lora_A.second" in name:
        parameter.data = parameter.data.double()


REFUSED = {
    "unknown": (lambda m: None, ["nobody"], ValueError, "names: expected adapters of the model"),
    "one string": (lambda m: None, "second", TypeError, "names: expected a name for each sample"),
    "a head of one adapter": (
        _saved, ["fourth", "default"], ValueError,
        r"lm_head': ModulesToSaveWrapper, which has one adapter for all samples, now fourth",
    ),
    "tokens of another": (_tokens_trained, ["fourth"], ValueError, "TrainableTokens.*now none"),
    "no string": (lambda m: None, [1], TypeError, "names: expected strings, got 1"),
    "no name": (lambda m: None, ["second", None], TypeError, "names: expected strings, got None"),
    "none": (lambda m: None, None, TypeError, "names: expected a sequence of strings, got None"),
    "a set": (lambda m: None, {"second"}, TypeError, "names: expected a sequence of .*, got set"),
    "merged": (lambda m: m.merge_adapter(), NAMES, ValueError, "merged: default"),
    "an embedding": (_embeddings, ["fourth"], ValueError, "no patched linear layer"),
    "DoRA": (
        lambda m: m.add_adapter("fourth", lora_config(use_dora=True)), ["fourth"], ValueError,
        "another variant of LoRA",
    ),
    "a trained weight": (
        lambda m: [p.requires_grad_() for n, p in m.named_parameters() if "base_layer" in n],
        NAMES, ValueError, "base layer's weight requires grad",
    ),
    "two dtypes": (
        lambda m: [_to_double(*named) for named in m.named_parameters()],
        NAMES, ValueError, "lora_A is torch.float64, lora_B torch.float32",
    ),
    "dropout of two kinds": (
        lambda m: (m.add_adapter("fourth", lora_config(lora_dropout=0.5)), m.train()),
        ["fourth", "default"], ValueError, "probabilities of dropout differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_refused_is_named_before_anything_changes(pair, case):
    change, names, error, message = REFUSED[case]
    model, _ = pair
    change(model)
    with pytest.raises(error, match=message), lk.adapter_batch(model, names):
        pass
    assert not any("_lora_kernels_batch" in vars(m) for m in model.modules())


def test_wrong_number_of_samples_and_nesting(pair):
    model, _ = pair
    with lk.adapter_batch(model, NAMES):
        with pytest.raises(ValueError, match="names: expected one of each of 2 samples"):
            model(input_ids=tokens(2))
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        for x, got in ((None, "NoneType"), (torch.tensor(1.0), "a 0-dimensional one")):
            with pytest.raises(TypeError, match=f"x: expected a Tensor of 6 samples, got {got}"):
                layer(x)
        with pytest.raises(ValueError, match="alone in adapter_batch, got adapter_names"):
            model(input_ids=tokens(), adapter_names=NAMES[::-1])
        with (
            pytest.raises(ValueError, match="in an adapter_batch already"),
            lk.adapter_batch(model, NAMES),
        ):
            pass
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        lk.adapter_batch(3, NAMES).__enter__()
    with pytest.raises(ValueError, match="model: expected PEFT LoRA layers"):
        lk.adapter_batch(nn.Linear(2, 2), NAMES).__enter__()


def test_what_is_left_computes_as_peft_does(pair):
    for each in pair:
        each.base_model.model.model.layers[0].self_attn.q_proj.base_layer.register_forward_hook(
            lambda *_: None
        )
    ids = tokens()
    got, expected = (m(input_ids=ids, adapter_names=NAMES).logits for m in pair)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    left = [use for use in lk.report(pair[0]).layers.values() if use.left]
    assert [use.reason for use in left] == ["base layer has hooks"]


def test_a_factor_whose_memory_is_gone_is_peft_s_to_refuse(pair):
    model, _ = pair
    q = model.base_model.model.model.layers[0].self_attn.q_proj
    q.lora_B["second"].weight.data = torch.empty(0)
    with pytest.raises(RuntimeError):
        model(input_ids=tokens(), adapter_names=NAMES)
    with pytest.raises(ValueError, match="no plain factors"), lk.adapter_batch(model, NAMES):
        pass


def test_few_rows_an_adapter_are_left_to_peft_where_factors_would_be_copied():
    plain = model_of(torch.float64).eval()  # which the compiled part doesn't serve
    model = copy.deepcopy(plain)
    lk.patch_peft(model)
    for length, fused in ((5, 0), (8, 1)):  # of 3 adapters, 30 and 48 rows
        ids = tokens(6, length)
        got, expected = (m(input_ids=ids, adapter_names=NAMES).logits for m in (model, plain))
        torch.testing.assert_close(got, expected)
        use = lk.report(model).layers.values()
        assert all(each.fused == fused and each.left == 1 for each in use)
    assert {each.reason for each in use} == {"fewer than 16 rows an adapter"}


@pytest.mark.skipif(absence("cpu") is not None, reason=str(absence("cpu")))
def test_few_rows_an_adapter_are_fused_by_the_compiled_part(pair):
    model, _ = pair
    lk.patch_peft(model)
    ids = tokens(6, 1)
    got, expected = (m(input_ids=ids, adapter_names=NAMES).logits for m in pair)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert all(use.fused == 1 and not use.left for use in lk.report(model).layers.values())


def test_inference_tensors_are_left_to_peft_where_gradients_are_recorded(pair):
    model, _ = pair
    linear = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["second"]
    with torch.inference_mode():
        linear.weight = nn.Parameter(torch.randn_like(linear.weight), requires_grad=False)
    ids = tokens()
    with torch.no_grad():
        assert isinstance(model(input_ids=ids, adapter_names=NAMES).logits, torch.Tensor)
    with pytest.raises(ValueError, match="an inference tensor can't be saved"):  # noqa: SIM117
        with lk.adapter_batch(model, NAMES):
            model(input_ids=ids)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_that_all_samples_share_is_served(pair):
    model, _ = pair
    _saved(model)
    ids = tokens()
    expected = model(input_ids=ids).logits
    with lk.adapter_batch(model, ["fourth"] * len(ids)):
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_copied_inside_a_block_is_outside_of_any(pair, copied):
    model, plain = pair
    ids = tokens()
    with lk.adapter_batch(model, NAMES):
        other, another = copied(model), copied(model)
        expected = model(input_ids=ids).logits
    with lk.adapter_batch(another, NAMES):
        torch.testing.assert_close(another(input_ids=ids).logits, expected)
    torch.testing.assert_close(other(input_ids=ids).logits, plain(input_ids=ids).logits)
    layer = other.base_model.model.model.layers[0].self_attn.q_proj
    assert (layer._lora_kernels_calls.fused, layer._lora_kernels_calls.left) == (1, 0)


def test_what_a_layer_outside_of_the_batch_would_add_to_all_samples_is_refused(pair):
    model, _ = pair
    model.add_adapter("embeds", lora_config(target_modules=["embed_tokens"]))
    third = model.base_model.model.model.layers[0].self_attn.q_proj
    ids, names = tokens(2), ["third", "__base__"]
    with lk.adapter_batch(model, names):
        expected = model(input_ids=ids).logits
    model.set_adapter("embeds")  # which neither sample asks for
    with pytest.raises(ValueError, match="no patched linear layer"), lk.adapter_batch(model, names):
        pass
    with model.disable_adapter(), lk.adapter_batch(model, ["__base__"] * 2):
        pass
    model.set_adapter("default")
    with lk.adapter_batch(model, names):
        assert model(input_ids=ids).logits.equal(expected)
        with (
            pytest.raises(ValueError, match="in an adapter_batch already"),
            lk.adapter_batch(model, ["__base__"] * 2),
        ):
            pass
        assert "_lora_kernels_batch" in vars(third)
    lk.unpatch_peft(model)
    with pytest.raises(ValueError, match="is Linear"), lk.adapter_batch(model, ["__base__"] * 2):
        pass


def test_a_merged_layer_without_any_adapter_of_the_batch_is_refused(pair):
    model, plain = pair
    ids, names = tokens(2), ["third", "__base__"]  # adapts q_proj alone
    v = model.base_model.model.model.layers[0].self_attn.v_proj
    v.merge()
    with pytest.raises(ValueError, match="merged: default"), lk.adapter_batch(model, names):
        pass
    v.unmerge()
    with lk.adapter_batch(model, names), plain.disable_adapter():
        v.merge()
        with pytest.raises(ValueError, match="merged: default"):
            model(input_ids=ids)
        with model.disable_adapter():
            found, expected = (m(input_ids=ids).logits for m in pair)
    assert not v.merged
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

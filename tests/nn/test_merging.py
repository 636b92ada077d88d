"""Merging adapters: shared, tied and moved weights, others' writes, what is refused."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lora_kernels as lk

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def adapters(base, count):
    layers = [lk.LoRALinear.from_linear(base, r=4, lora_alpha=6) for _ in range(count)]
    for layer in layers:
        nn.init.normal_(layer.lora_B.weight, std=10)
    return layers


def summed(weight, layers):
    wide = weight.double()
    for layer in layers:
        if layer.merged:
            a, b = layer.lora_A.weight.double(), layer.lora_B.weight.double()
            wide = wide + layer.scaling * b @ a
    return wide.to(weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("off", list(itertools.permutations(range(3))), ids=str)
def test_adapters_on_one_base_come_and_go_in_any_order(off, dtype):
    base = nn.Linear(24, 16, dtype=dtype)
    layers = adapters(base, 3)
    weight, before = base.weight, base.weight.detach().clone()
    eps = torch.finfo(dtype).eps
    for layer in layers:
        layer.merge()
        torch.testing.assert_close(base.weight, summed(before, layers), rtol=4 * eps, atol=1e-4)
    for index in off:
        layers[index].unmerge()
        torch.testing.assert_close(base.weight, summed(before, layers), rtol=4 * eps, atol=1e-4)
    assert base.weight is weight
    assert torch.equal(weight, before)


def test_a_merge_between_others_leaves_them():
    base = nn.Linear(24, 16)
    first, second = adapters(base, 2)
    before = base.weight.detach().clone()
    for layer in (first, second):
        layer.merge()
    first.unmerge()
    first.merge()
    torch.testing.assert_close(base.weight, summed(before, [first, second]))
    second.unmerge()
    first.unmerge()
    assert torch.equal(base.weight, before)


def test_a_tied_embedding_keeps_its_weight():
    table = nn.Embedding(16, 24)
    head = nn.Linear(24, 16, bias=False)
    head.weight = table.weight
    (layer,) = adapters(head, 1)
    x, before = torch.randn(5, 24), table.weight.detach().clone()
    expected = layer(x)
    layer.merge()
    assert torch.equal(table.weight, before)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert head.weight is table.weight
    assert torch.equal(table.weight, before)


def test_linears_tied_to_each_other_are_merged_one_by_one():
    one, other = nn.Linear(24, 16), nn.Linear(24, 16)
    other.weight = one.weight
    first, second = *adapters(one, 1), *adapters(other, 1)
    x = torch.randn(5, 24)
    expected = second(x)
    first.merge()
    torch.testing.assert_close(second(x), expected)
    second.merge()
    torch.testing.assert_close(second(x), expected, rtol=1e-4, atol=1e-4)
    first.unmerge()
    second.unmerge()
    assert one.weight is other.weight


def test_what_was_merged_is_taken_back_though_the_adapter_changed():
    base = nn.Linear(24, 16)
    (layer,) = adapters(base, 1)
    before = base.weight.detach().clone()
    layer.merge()
    layer.reset_lora_parameters()
    layer.lora_alpha = 100
    layer.unmerge()
    assert torch.equal(base.weight, before)


def in_place(base):
    base.weight.detach().add_(1)


def through_data(base):
    base.weight.data += 1


def replaced(base):
    base.weight = nn.Parameter(base.weight.detach() + 1, requires_grad=False)


@pytest.mark.parametrize("write", [in_place, through_data, replaced])
@pytest.mark.parametrize("count", [1, 2])
def test_what_others_write_stays(write, count):
    base = nn.Linear(24, 16)
    layers = adapters(base, count)
    before = base.weight.detach().clone()
    for layer in layers:
        layer.merge()
    write(base)
    for layer in layers:
        layer.unmerge()
    torch.testing.assert_close(base.weight, before + 1, rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_leaves_no_trace(value):
    base = nn.Linear(24, 16)
    (layer,) = adapters(base, 1)
    before = base.weight.detach().clone()
    nn.init.constant_(layer.lora_B.weight, value)
    layer.merge()
    layer.unmerge()
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merged_layer_may_move(dtype):
    base = nn.Linear(24, 16)
    (layer,) = adapters(base, 1)
    before = base.weight.detach().clone()
    layer.merge()
    layer.to(dtype)
    layer.unmerge()
    assert base.weight.dtype == dtype
    assert torch.equal(base.weight, before.to(dtype))
    assert not base.weight.requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_merged_layers_is_its_own(copied):
    base = nn.Linear(24, 16)
    layers = adapters(base, 2)
    before = base.weight.detach().clone()
    for layer in layers:
        layer.merge()
    merged = base.weight.detach().clone()
    twins = copied(nn.ModuleList(layers))
    for twin in twins:
        twin.unmerge()
    assert torch.equal(twins[0].base_layer.weight, before)
    assert torch.equal(base.weight, merged)
    for layer in layers:
        layer.unmerge()
    assert torch.equal(base.weight, before)


def test_a_merge_between_forward_and_backward_is_harmless():
    layer = adapters(nn.Linear(24, 16), 1)[0]
    x = torch.randn(5, 24, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    y = layer(x).sum()
    layer.merge()
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


def test_state_dictionaries_of_merged_layers_are_plain():
    layer = adapters(nn.Linear(24, 16), 1)[0]
    keys = list(layer.state_dict())
    layer.merge()
    assert list(layer.state_dict()) == keys
    assert not list(layer.buffers())
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.weight",
        "lora_B.weight",
    }


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x).round()


def swapped(layer):
    layer.base_layer = OwnForward(24, 16)


def forward_replaced(layer):
    layer.base_layer.forward = torch.sin


def emptied(layer):
    layer.base_layer.weight.data = torch.empty(0)


def without_memory(layer):
    layer.base_layer.weight.untyped_storage().resize_(0)


def adapter_without_memory(layer):
    layer.lora_A.weight.untyped_storage().resize_(0)


def on_meta(layer):
    layer.to("meta")


def adapter_biased(layer):
    layer.lora_B = nn.Linear(4, 16)


def adapter_pruned(layer):
    prune.l1_unstructured(layer.lora_A, "weight", 5)


REFUSED = [
    (swapped, "base_layer: expected torch.nn.Linear's own forward to merge, got one of OwnForward"),
    (forward_replaced, "base_layer: expected torch.nn.Linear's own forward to merge"),
    (emptied, r"base_layer.weight: expected a float parameter to merge, got one of shape \[0\]"),
    (without_memory, "base_layer.weight: expected memory for shape"),
    (adapter_without_memory, "lora_A.weight: expected memory for shape"),
    (on_meta, "lora_A.weight: expected a float parameter to merge, got one on meta"),
    (adapter_biased, "lora_A, lora_B: expected no bias to merge, got one"),
    (adapter_pruned, "lora_A.weight: expected .* got one that is computed from weight_orig"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_has_no_plain_weight_is_not_merged(change, message):
    layer = adapters(nn.Linear(24, 16), 1)[0]
    change(layer)
    weight = layer.base_layer.weight
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        layer.merge()
    assert not layer.merged
    assert layer.base_layer.weight is weight


def another(layer):
    layer.base_layer = nn.Linear(24, 16)


UNMERGING = [
    (another, "base_layer: expected the layer that the adapter was merged into, got another"),
    (forward_replaced, "base_layer: expected torch.nn.Linear's own forward to merge"),
    (
        lambda layer: prune.l1_unstructured(layer.base_layer, "weight", 5),
        "base_layer.weight: expected .* got one that is computed from weight_orig",
    ),
]


@pytest.mark.parametrize(("change", "message"), UNMERGING)
def test_what_was_not_merged_is_not_unmerged(change, message):
    layer = adapters(nn.Linear(24, 16), 1)[0]
    layer.merge()
    change(layer)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        layer.unmerge()
    assert layer.merged
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())

"""Liger's kernels and a patched model: each replaces what the other leaves alone.

Liger's kernels run on GPUs alone, so this is a stand-in of what liger_kernel 0.8.5 does to a Llama:
forwards bound to norms, MLPs and the model, which call or read the layers below them.
"""

import copy
from types import MethodType

import pytest
import torch
from torch.nn import functional as F

import lora_kernels as lk
from tests.stacks.models import FusedCalls, adapted_llama, assert_same_gradients, tokens

transformers = pytest.importorskip("transformers")

LAYERS = 14


def rms_norm(self, x):
    return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.variance_epsilon)


def swiglu(self, x):
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def fused_linear_cross_entropy(self, input_ids, labels, **kwargs):
    hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state[:, :-1]
    # No call of lm_head: the kernel reads its weight.
    logits = hidden @ self.lm_head.weight.T
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def apply_liger(model):
    causal = model.get_base_model()
    norms = [causal.model.norm]
    for block in causal.model.layers:
        norms += [block.input_layernorm, block.post_attention_layernorm]
        block.mlp.forward = MethodType(swiglu, block.mlp)
    for norm in norms:
        norm.forward = MethodType(rms_norm, norm)
    causal.forward = MethodType(fused_linear_cross_entropy, causal)


@pytest.mark.parametrize("order", [(lk.patch_peft, apply_liger), (apply_liger, lk.patch_peft)])
def test_a_model_with_both(order):
    theirs = adapted_llama()
    ours = copy.deepcopy(theirs)
    apply_liger(theirs)
    for apply in order:
        apply(ours)
    rows = tokens()
    with FusedCalls() as fused:
        for model in (theirs, ours):
            model(input_ids=rows, labels=rows).backward()
    assert fused.count == LAYERS
    assert_same_gradients(ours, theirs)
    assert all(layer.state is None for layer in lk.report(ours).layers.values())


def test_stand_in_is_the_model_itself():
    model, rows = adapted_llama(), tokens()
    expected = model(input_ids=rows, labels=rows).loss
    apply_liger(model)
    torch.testing.assert_close(model(input_ids=rows, labels=rows), expected)

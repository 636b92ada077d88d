"""Modules that read their submodules' weights: LoRALinear's weight is what it computes with."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk


def adapt(owner, name, **settings):
    layer = lk.LoRALinear.from_linear(getattr(owner, name), r=4, **settings)
    nn.init.normal_(layer.lora_B.weight, std=0.3)
    setattr(owner, name, layer)
    return layer


def plain(model):
    """A copy of the model with every adapted layer replaced by the linear that it equals."""
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, lk.LoRALinear):
            base = layer.base_layer
            update = layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
            base.weight = nn.Parameter((base.weight + update).detach())
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, base)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=str)
def test_weight_is_the_sum_in_the_bases_dtype(dtype, adapter_dtype):
    layer = lk.LoRALinear(24, 16, r=4, dtype=dtype, adapter_dtype=adapter_dtype)
    nn.init.normal_(layer.lora_B.weight)
    w, a, b = (m.weight.double() for m in (layer.base_layer, layer.lora_A, layer.lora_B))
    weight, expected = layer.weight, w + layer.scaling * b @ a
    assert weight.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weight.double(), expected, rtol=eps, atol=16 * eps)
    dw = torch.randn(16, 24)
    weight.backward(dw.to(dtype))
    expected = layer.scaling * dw.to(dtype).double() @ a.T
    torch.testing.assert_close(layer.lora_B.weight.grad.double(), expected, rtol=0, atol=64 * eps)
    assert layer.base_layer.weight.grad is None
    layer.merge()
    assert layer.weight is layer.base_layer.weight
    torch.testing.assert_close(layer.weight, weight)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_multihead_attention(batch_first, training, trained):
    attention = nn.MultiheadAttention(32, 4, batch_first=batch_first)
    layer = adapt(attention, "out_proj")
    expected, x = plain(attention), torch.randn(2, 5, 32)
    for module in (attention, expected):
        module.train(training).requires_grad_(trained)
    y = attention(x, x, x)[0]
    torch.testing.assert_close(y, expected(x, x, x)[0])
    with torch.no_grad():
        torch.testing.assert_close(attention(x, x, x)[0], y)
    if trained:
        y.square().sum().backward()
        expected(x, x, x)[0].square().sum().backward()
        dw, a, b = expected.out_proj.weight.grad, layer.lora_A.weight, layer.lora_B.weight
        torch.testing.assert_close(a.grad, layer.scaling * b.T @ dw)
        torch.testing.assert_close(b.grad, layer.scaling * dw @ a.T)
    layer.merge()
    torch.testing.assert_close(attention(x, x, x)[0], y)


def encoder_layer(**settings):
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    adapt(layer.self_attn, "out_proj")
    adapt(layer, "linear1", **settings)
    adapt(layer, "linear2", **settings)
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_transformer_encoder_layer(training, trained, enabled):
    layer = encoder_layer()
    expected, x = plain(layer), torch.randn(3, 6, 32)
    for module in (layer, expected):
        module.train(training).requires_grad_(trained)
    with torch.set_grad_enabled(enabled):
        y = layer(x)
        torch.testing.assert_close(y, expected(x))
    if y.requires_grad:
        y.sum().backward()
        adapters = [p for n, p in layer.named_parameters() if "lora_" in n]
        assert len(adapters) == 6
        assert all(p.grad.any() for p in adapters)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_of_nested_tensors():
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    expected = plain(encoder)
    x, padded = torch.randn(3, 6, 32), torch.arange(6) >= torch.tensor([[6], [4], [2]])
    with torch.no_grad():
        results = [m(x, src_key_padding_mask=padded) for m in (encoder, expected)]
    torch.testing.assert_close(*results)


def test_dropout_that_the_owner_would_not_apply_is_refused():
    attention = nn.MultiheadAttention(32, 4)
    with pytest.raises(ValueError, match=r"^lora_dropout: expected 0 around MultiheadAttention"):
        lk.LoRALinear.from_linear(attention.out_proj, lora_dropout=0.1)
    assert attention.out_proj.weight.requires_grad
    layer, x = adapt(attention, "out_proj"), torch.randn(2, 5, 32)
    layer.lora_dropout = 0.1
    with pytest.raises(RuntimeError, match=r"^lora_dropout: expected 0 around MultiheadAttention"):
        attention(x, x, x)
    attention.eval()
    torch.testing.assert_close(attention(x, x, x)[0], plain(attention)(x, x, x)[0])


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_without_matrices_has_no_sum():
    attention = nn.MultiheadAttention(32, 4).eval()
    adapt(attention, "out_proj")
    x = torch.randn(2, 5, 32)
    attention = torch.ao.quantization.quantize_dynamic(attention, dtype=torch.qint8)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^weight: expected plain matrices"):
        attention(x, x, x)


class ReadsDtype(nn.Module):
    """T5's feed-forward layer reads `wo.weight` so."""

    def __init__(self):
        super().__init__()
        self.wo = nn.Linear(24, 16, dtype=torch.bfloat16)

    def forward(self, x):
        if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


@pytest.mark.filterwarnings("ignore")
def test_owners_that_read_the_dtype():
    owner, x = ReadsDtype(), torch.randn(5, 24)
    layer = adapt(owner, "wo", adapter_dtype=torch.float32, lora_dropout=0.1)
    assert owner(x).dtype == torch.bfloat16
    assert layer.weight.shape == (16, 24)
    layer.base_layer.weight.data = torch.empty(0, dtype=torch.bfloat16)  # as ZeRO-3 leaves it
    assert layer.weight is layer.base_layer.weight
    owner = ReadsDtype().float().eval()
    adapt(owner, "wo")
    owner = torch.ao.quantization.quantize_dynamic(owner, dtype=torch.qint8)
    assert owner(x).shape == (5, 16)

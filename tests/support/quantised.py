"""Quantised weights for tests: what the formats mean, in NumPy, and layers that have them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import lora_kernels as lk
from lora_kernels.native import absence
from lora_kernels.operands.codebook import CodebookWeight
from lora_kernels.operands.scaled import ScaledWeight

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(sign * v / 12 for sign in (1, -1) for v in (0.0, 0.0625, 8, 12, 4, 6, 2, 3))
FORMATS = ("nf4", "nf4-nested", "fp4", "int8", "float8-tiles", "float8-rows")
COMPILED = absence("cpu") is None
# What bitsandbytes' own layers can do: their autograd functions have few rules.
TRANSFORMS = {"nf4": ("vmap", "jvp", "grad", "trace"), "int8": ("make_fx", "trace")}
ON_CPUS = "cpu" if COMPILED else "eager"  # what "auto" takes there for float32 and bfloat16


def drawn(name, n, k, blocksize=64, device=None):
    """Return a weight of a format with elements of order K^-1/2, as random codes and scales."""
    word, _, how = name.partition("-")
    size = float(k) ** -0.5
    if word in ("nf4", "fp4"):
        count = (n * k + 1) // 2
        codes = torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)
        blocks = -(-n * k // blocksize)
        code = torch.tensor(NF4 if word == "nf4" else FP4, device=device)
        absmax = torch.rand(blocks, device=device) * size * 2
        parts = (absmax, code)
        if how:
            code2 = torch.linspace(-1, 1, 256, device=device)
            absmax2 = torch.rand(-(-blocks // 256), device=device) * size
            bytes_ = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
            parts = (bytes_, code, code2, absmax2, torch.tensor(size, device=device))
        return CodebookWeight(word, (n, k), blocksize, codes, parts)
    block = (128, 128) if how == "tiles" else (1, k)
    scales = torch.rand(-(-n // block[0]), -(-k // block[1]), device=device) * size
    if word == "int8":
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        return ScaledWeight("int8", block, codes, scales.view(-1), 127)
    codes = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
    return ScaledWeight("float8", block, codes, scales)


def absmax_of(weight):
    """Return the scales of blocks: nested ones are rounded after the product and after the sum."""
    if len(weight.parts) == 2:
        return weight.parts[0].numpy()
    bytes_, _, code2, absmax2, offset = (t.numpy() for t in weight.parts)
    products = code2[bytes_] * np.repeat(absmax2, 256)[: bytes_.size]
    return (products.astype(np.float32) + np.float32(offset)).astype(np.float32)


def expected(weight, dtype):
    """Return W by the formats' definition: one product in float32, rounded once."""
    n, k = weight.shape
    if isinstance(weight, CodebookWeight):
        packed = weight.stored.numpy()
        nibbles = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: n * k]
        scales = np.repeat(absmax_of(weight), weight.blocksize)[: n * k]
        values = (weight.parts[1].numpy()[nibbles] * scales).reshape(n, k)
    else:
        rows, columns = weight.block
        scales = weight.parts[0].float().numpy().reshape(-(-n // rows), -(-k // columns))
        if weight.divisor != 1:
            scales = scales * np.float32(1 / weight.divisor)
        scales = scales.repeat(rows, 0)[:n].repeat(columns, 1)[:, :k]
        values = weight.stored.float().numpy() * scales
    assert values.dtype == np.float32
    return torch.from_numpy(values.copy()).to(dtype)


def bits(t):
    """Return a float tensor's bits, either zero as +0, any NaN as one."""
    t = torch.where(t == 0, torch.zeros_like(t), t)
    t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t)
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


class Net(nn.Module):
    """Two layers of 56 and 40 features with a quantised weight, of one of bitsandbytes' kinds.

    Rows of 48 codes are ones that bitsandbytes 0.50 decodes wrongly by AVX512.
    """

    def __init__(self, kind="nf4", dtype=None, nested=True, storage=torch.uint8):
        super().__init__()
        bnb = pytest.importorskip("bitsandbytes")
        if kind == "int8":
            how = {"has_fp16_weights": False}
            kind = bnb.nn.Linear8bitLt
        else:
            how = {"quant_type": kind, "compute_dtype": dtype, "compress_statistics": nested}
            how["quant_storage"] = storage
            kind = bnb.nn.Linear4bit
        self.a = kind(56, 40, **how)
        self.b = kind(40, 56, bias=False, **how)
        self.is_loaded_in_8bit = kind is bnb.nn.Linear8bitLt
        self.is_loaded_in_4bit = not self.is_loaded_in_8bit
        self.to("cpu")  # quantises

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def adapted(kind="nf4", patched=True, seed=0, dropout=0.0, **how):
    """Return a PEFT model of a Net, patched or as PEFT has it; alike for one seed."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, lora_dropout=dropout, target_modules=["a", "b"], init_lora_weights=False
    )
    model = peft.get_peft_model(Net(kind, **how), config)
    if patched:
        found = lk.patch_peft(model)
        assert not found.left, found
    return model


def is_served(impl, word):
    """Whether a report says that calls with weights in a format are served as they should be."""
    return impl.partition(" ")[0] == ON_CPUS and impl.endswith(f"weights in {word})")


def results(model, x):
    """Return y and the adapters' gradients of a step."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def transformed(layer, x, how):
    """Return what a transform, a trace or a graph of a layer gives."""
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def with_parameters(given):
        return torch.func.functional_call(layer, given, (x,)).square()

    if how == "vmap":
        return torch.func.vmap(layer)(torch.stack([x, x.flip(0)]))
    if how == "jvp":
        return torch.func.jvp(with_parameters, (trained,), (trained,))
    if how == "grad":
        return torch.func.grad(lambda given: with_parameters(given).sum())(trained)
    trace = torch.jit.trace(layer, (x,), check_trace=False) if how == "trace" else make_fx(layer)(x)
    return trace(x)

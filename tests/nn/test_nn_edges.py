"""LoRALinear among other modules: what hangs on submodules' calls, swaps them, or reads weights."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.func import functional_call, grad, vmap
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrizations, prune
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import lora_kernels as lk
from tests.support.closeness import assert_close

SUBMODULES = ("base_layer", "lora_A", "lora_B")


def make_layer(**settings):
    layer = lk.LoRALinear(24, 16, r=4, lora_alpha=6, **settings)
    nn.init.normal_(layer.lora_B.weight, std=0.5)
    return layer


def by_modules(layer, x):
    """The layer as PEFT would compute it without dropout."""
    return layer.base_layer(x) + layer.scaling * layer.lora_B(layer.lora_A(x))


@pytest.fixture
def fused(monkeypatch):
    """The number of fused calls so far."""
    calls, function = [], lk.nn.linear.run
    monkeypatch.setattr(lk.nn.linear, "run", lambda *args: calls.append(args) or function(*args))
    return calls


def test_a_plain_layer_is_fused(fused):
    layer, x = make_layer(), torch.randn(5, 24)
    y = layer(x)
    assert len(fused) == 1
    torch.testing.assert_close(y, by_modules(layer, x))
    assert torch.equal(layer(input=x), y)
    with pytest.raises(TypeError, match=r"^x: expected a torch\.Tensor, got NoneType"):
        layer()


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(m)),
    "forward pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(m)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(m)),
    "backward pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append(m)),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("name", SUBMODULES)
def test_hooks_of_a_submodule_are_called(name, register):
    layer, seen = make_layer(), []
    module = getattr(layer, name)
    handle = register(module, seen)
    layer(torch.randn(5, 24, requires_grad=True)).sum().backward()
    assert seen == [module]
    handle.remove()
    layer(torch.randn(5, 24))
    assert seen == [module]


@pytest.mark.parametrize("peft", [False, True], ids=["LoRALinear", "patched"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_for_all_modules_are_called(kind, peft):
    layer, seen = make_layer(), []
    if peft:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(24, 16)), config)
        lk.patch_peft(model)
        layer = model.base_model.model[0]
    called = {type(m): m for m in layer.modules()}  # a Linear of the three, at least
    handle = getattr(hooks, f"register_module_{kind}_hook")(lambda m, *_: seen.append(m))
    try:
        layer(torch.randn(5, 24, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    linears = [m for m in layer.modules() if type(m) is nn.Linear]
    assert called[nn.Linear] in seen
    assert all(any(m is each for each in seen) for m in linears)


def test_torchs_trackers_measure_the_fused_call(fused):
    layer, x = make_layer(), torch.randn(5, 24)
    with CommDebugMode():
        layer(x)
    assert len(fused) == 1


class Rounded(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 8).round() / 8, self.bias)


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class Transposed(nn.Linear):
    """Inherits forward, but keeps W another way."""

    @property
    def weight(self):
        return self._parameters["weight"].flip(0)


def rounded(linear):
    return Rounded(linear.in_features, linear.out_features)


def biased(linear):
    return nn.Linear(linear.in_features, linear.out_features)


@pytest.mark.parametrize("name", SUBMODULES)
@pytest.mark.parametrize("swap", [rounded, Twice, biased])
def test_a_swapped_submodule_computes(name, swap, fused):
    layer, x = make_layer(), torch.randn(5, 24)
    setattr(layer, name, swap(getattr(layer, name)))
    torch.testing.assert_close(layer(x), by_modules(layer, x))
    assert not fused or (name, swap) == ("base_layer", biased)


def test_a_subclass_is_fused_where_it_is_a_plain_linear(fused):
    class Named(nn.Linear):
        pass

    layer, x = make_layer(), torch.randn(5, 24)
    layer.base_layer = Named(24, 16)
    torch.testing.assert_close(layer(x), by_modules(layer, x))
    assert len(fused) == 1
    layer.base_layer.__class__ = Transposed
    torch.testing.assert_close(layer(x), by_modules(layer, x))
    assert len(fused) == 1


def test_a_replaced_forward_computes(monkeypatch):
    layer, x = make_layer(), torch.randn(5, 24)
    layer.base_layer.forward = lambda v: torch.zeros(len(v), 16)
    torch.testing.assert_close(layer(x), by_modules(layer, x))
    layer, forward = make_layer(), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, v: 3 * forward(self, v))
    torch.testing.assert_close(layer(x), by_modules(layer, x))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_composition_has_the_layers_dtypes_and_dropout(adapter_dtype):
    layer = make_layer(dtype=torch.bfloat16, adapter_dtype=adapter_dtype, lora_dropout=0.5)
    x = torch.randn(64, 24).bfloat16()
    fused = layer.eval()(x)
    layer.base_layer.register_forward_hook(lambda *_: None)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), fused, rtol=0.05, atol=0.05)
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    mean = torch.stack([layer(x).float() for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, fused.float(), rtol=0, atol=1.0)


def test_accelerate_offloads():
    accelerate = pytest.importorskip("accelerate")
    layer, x = make_layer(), torch.randn(5, 24)
    expected, model = layer(x), nn.Sequential(layer)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    accelerate.cpu_offload(model, execution_device="cpu", state_dict=state)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(TypeError, match=r"^lora_A: expected torch\.nn\.Linear's own forward"):
        layer.merge()


@pytest.mark.filterwarnings("ignore")
def test_swaps_of_torch_ao_compute():
    quantization = torch.ao.quantization
    x = torch.randn(5, 24)
    layer = make_layer().eval()
    expected = layer(x)
    dynamic = quantization.quantize_dynamic(copy.deepcopy(layer), dtype=torch.qint8)
    torch.testing.assert_close(dynamic(x), by_modules(dynamic, x))
    torch.testing.assert_close(dynamic(x), expected, rtol=0, atol=0.2)
    with pytest.raises(TypeError, match=r"^lora_A\.weight: expected .* got none in Linear"):
        dynamic.merge()
    model = nn.Sequential(layer).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    trained = quantization.prepare_qat(model)
    assert type(trained[0].base_layer) is torch.ao.nn.qat.Linear
    trained(x).sum().backward()
    assert trained[0].lora_A.weight.grad is not None
    torch.testing.assert_close(trained.eval()(x), expected, rtol=0, atol=0.5)


def test_plain_tensors_in_place_of_parameters(fused):
    layer, x = make_layer(), torch.randn(5, 24)
    state = {key: torch.randn_like(p) for key, p in layer.named_parameters()}
    for p in state.values():
        p.requires_grad_()
    y = functional_call(layer, state, (x,))
    assert len(fused) == 1
    w, bias, a, b = state.values()
    torch.testing.assert_close(y, x @ w.T + bias + 1.5 * x @ a.T @ b.T, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert all(p.grad is not None for p in state.values())
    # As FSDP1 does in forward.
    flat, start = torch.cat([p.detach().flatten() for p in state.values()]), 0
    for key, p in state.items():
        module, _, name = key.rpartition(".")
        module = layer.get_submodule(module)
        del module._parameters[name]
        object.__setattr__(module, name, flat[start : start + p.numel()].view(p.shape))
        start += p.numel()
    torch.testing.assert_close(layer(x), y)
    assert len(fused) == 2


def test_per_sample_gradients():
    layer, x = make_layer(), torch.randn(5, 24)
    expected = []
    for row in x:
        layer.zero_grad()
        layer(row[None]).square().sum().backward()
        expected.append(layer.lora_A.weight.grad.clone())
    expected = torch.stack(expected)
    state = {key: p.detach() for key, p in layer.named_parameters()}

    def loss(parameters, row):
        return functional_call(layer, parameters, (row[None],)).square().sum()

    by_row = vmap(grad(loss), in_dims=(None, 0))(state, x)
    torch.testing.assert_close(by_row["lora_A.weight"], expected, rtol=1e-4, atol=1e-4)
    layer.zero_grad()
    call_for_per_sample_grads(layer, batch_size=5, loss_reduction="sum")(
        x
    ).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.weight.grad_sample, expected, rtol=1e-4, atol=1e-4)


def test_hooks_that_gather_per_sample_gradients():
    """As Opacus sets them: activations by forward hooks, their gradients by backward hooks."""
    layer, x, activations = make_layer(), torch.randn(5, 24), {}
    for module in (layer.lora_A, layer.lora_B):
        module.register_forward_hook(lambda m, i, o: activations.update({m: i[0].detach()}))

        def gather(m, gradients, dy):
            m.weight.grad_sample = torch.einsum("bn,bk->bnk", dy[0], activations[m])

        module.register_full_backward_hook(gather)
    layer(x).square().sum().backward()
    for p in (layer.lora_A.weight, layer.lora_B.weight):
        assert_close(p.grad_sample.sum(0), p.grad)


def test_meta_nested_and_sparse_inputs():
    layer = make_layer()
    assert make_layer(device="meta")(torch.empty(5, 7, 24, device="meta")).shape == (5, 7, 16)
    rows = [torch.randn(3, 24), torch.randn(5, 24)]
    for layout in (torch.strided, torch.jagged):
        y = layer(torch.nested.nested_tensor(rows, layout=layout))
        for got, row in zip(y.unbind(), rows, strict=True):
            torch.testing.assert_close(got, layer(row))
    torch.testing.assert_close(layer(rows[0].to_sparse()), layer(rows[0]))
    graph = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    torch.testing.assert_close(graph(rows[0]), layer(rows[0]).relu())


class Scaled(torch.Tensor):
    """int8 and a scale that pass for float32."""

    @staticmethod
    def __new__(cls, q, scale):
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=torch.float32)

    def __init__(self, q, scale):
        self.q, self.scale = q, scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return func(args[0], args[1].q.float() * args[1].scale, *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].q, args[0].scale)
        raise NotImplementedError(f"{cls.__name__}: {func}")


def quantise(linear):
    w = linear.weight.detach()
    scale = w.abs().max() / 127
    scaled = Scaled((w / scale).round().to(torch.int8), scale)
    linear.weight = nn.Parameter(scaled, requires_grad=False)
    return linear


def test_a_tensor_subclass_is_refused_and_composed():
    with pytest.raises(TypeError, match=r"^linear: expected a plain weight, got a Scaled"):
        lk.LoRALinear.from_linear(quantise(nn.Linear(24, 16)))
    layer, x = make_layer(), torch.randn(5, 24)
    quantise(layer.base_layer)
    torch.testing.assert_close(layer(x), by_modules(layer, x))
    assert layer.weight is layer.base_layer.weight
    with pytest.raises(TypeError, match=r"^base_layer\.weight: expected .* got a Scaled"):
        layer.merge()
    assert not layer.merged


COMPUTED = {
    "parametrised": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm": pytest.param(
        nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm")
    ),
    "spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
}


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_a_computed_weight_is_composed_and_not_merged_into(compute):
    linear = compute(nn.Linear(24, 16)).eval()
    expected, x = linear(torch.eye(24)) - linear.bias, torch.randn(5, 24)
    layer = lk.LoRALinear.from_linear(linear, r=4)
    nn.init.normal_(layer.lora_B.weight)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.weight",
        "lora_B.weight",
    }
    y = layer(x)
    torch.testing.assert_close(y, by_modules(layer, x))
    update = layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer.weight, expected.T + update)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(TypeError, match=r"^base_layer\.weight: expected .* (computes|computed)"):
        layer.merge()
    assert not layer.merged
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    layer = make_layer()
    compute(layer.lora_A)
    with pytest.raises(TypeError, match=r"^lora_A\.weight: expected .* (computes|computed)"):
        layer.merge()


def test_a_computed_bias_is_trained_by_nobody():
    linear = prune.l1_unstructured(nn.Linear(24, 16), "bias", 0.5)
    with pytest.raises(TypeError, match=r"^linear: expected a bias parameter for bias='all'"):
        lk.LoRALinear.from_linear(linear, bias="all")
    assert all(p.requires_grad for p in linear.parameters())
    assert not lk.LoRALinear.from_linear(linear).base_layer.bias_orig.requires_grad


@pytest.mark.parametrize(
    "alpha",
    [lambda: nn.Parameter(torch.tensor(2.0)), lambda: torch.arange(6.0)[:, None], lambda: math.inf],
    ids=["trained", "a factor a row", "infinite"],
)
def test_lora_alpha_may_be_what_only_the_submodules_multiply_by(alpha):
    layer, x = lk.LoRALinear(8, 5, r=2), torch.randn(6, 8)
    nn.init.normal_(layer.lora_B.weight)
    layer.lora_alpha = alpha()
    expected = layer.base_layer(x) + layer.lora_B(layer.lora_A(x)) * layer.scaling
    y = layer(x)
    torch.testing.assert_close(y, expected, equal_nan=True)
    if isinstance(layer.lora_alpha, nn.Parameter):
        y.sum().backward()
        assert layer.lora_alpha.grad is not None


@pytest.mark.parametrize("p", [2.0, -0.5, math.nan, None])
def test_lora_dropout_that_is_none_is_named(p):
    layer = lk.LoRALinear(8, 5, r=2)
    layer.lora_dropout = p
    with pytest.raises((TypeError, ValueError), match=r"^lora_dropout: expected a "):
        layer(torch.randn(6, 8))
    layer.eval()(torch.randn(6, 8))

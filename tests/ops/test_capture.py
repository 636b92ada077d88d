"""Graphs that were captured train: gradients as of the same capture of the unpatched model."""

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import grad, jvp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels.impl.eager import linear as eager
from lora_kernels.ops import linear
from tests.support.closeness import assert_close

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.unpoisoned
BOTH = ("forward", "backward")
X = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, v):
        for layer in self.layers:
            v = torch.tanh(layer(v))
        return v


def net(patch, dropout=0.0):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_dropout=dropout, target_modules=r"layers\.\d", init_lora_weights=False
    )
    model = peft.inject_adapter_in_model(config, Net())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if patch:
        lk.patch_peft(model)
    return model


def exported(model, **how):
    return torch.export.export(model, (X,), **how)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.export.save(exported(model), file)
    file.seek(0)
    return torch.export.load(file).module()


def stages(model):
    from torch.distributed.pipelining import SplitPoint, pipeline

    pipe = pipeline(model, mb_args=(X,), split_spec={"layers.1": SplitPoint.BEGINNING})
    return nn.Sequential(*(pipe.get_stage_module(i) for i in range(pipe.num_stages)))


def traced(model, loaded=False):
    module = torch.jit.trace(model, (X,))
    if not loaded:
        return module
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


def by_aot(model):
    from functorch.compile import aot_module, nop

    return aot_module(model, nop)


CAPTURES = {
    "export": lambda m: exported(m).module(),
    "strict export": lambda m: exported(m, strict=True).module(),
    "saved and loaded": saved_and_loaded,
    "decomposed": lambda m: exported(m).run_decompositions().module(),
    "unflattened": lambda m: torch.export.unflatten(exported(m)),
    "stages of a pipeline": stages,
    "make_fx": lambda m: make_fx(m)(X),
    "make_fx, fake": lambda m: make_fx(m, tracing_mode="fake", _allow_non_fake_inputs=True)(X),
    "make_fx, symbolic": lambda m: make_fx(m, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        X
    ),
    "aot_module": by_aot,
    "jit.trace": traced,
    "jit.trace, no_grad": torch.no_grad()(traced),
    "jit.trace, saved and loaded": lambda m: traced(m, loaded=True),
}


def gradients(captured, owner):
    """Gradients of both layers' adapters; a capture may hold its parameters or the model's."""
    out = captured(X)
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    return [p.grad for module in (captured, owner) for n, p in named(module) if p.grad is not None]


def named(module):
    return [(n, p) for n, p in module.named_parameters() if "lora_" in n]


@pytest.mark.parametrize("name", CAPTURES)
def test_a_captured_graph_trains(name):
    found = []
    for patch in (False, True):
        model = net(patch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            found.append(gradients(CAPTURES[name](model), model))
    assert len(found[1]) >= 4
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", ["make_fx", "make_fx, fake", "make_fx, symbolic"])
def test_a_captured_graph_under_autocast(name):
    found = []
    for patch in (False, True):
        model = net(patch)
        captured = CAPTURES[name](model)
        with torch.autocast("cpu", torch.bfloat16):
            y = captured(X)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        found.append([p.grad for m in (captured, model) for _, p in named(m) if p.grad is not None])
    assert len(found[1]) == 4
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 0.03)


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_export_in_training_mode_drops_and_trains(decomposed):
    program = exported(net(True, dropout=0.5))
    module = (program.run_decompositions() if decomposed else program).module()
    one, other = module(X), module(X)
    assert not torch.equal(one, other)
    one.sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in named(module))


def test_an_export_holds_the_layer_and_runs_it_fused():
    program = exported(net(True))
    operator = torch.ops.lora_kernels.lora_linear.default
    assert [n.target for n in program.graph.nodes].count(operator) == 2
    with Operators() as seen:
        program.module()(X)
    assert len(seen.names) == 2
    left = {str(n.target) for n in program.run_decompositions().graph.nodes}
    assert not any("lora_kernels" in name for name in left)


class Operators(TorchDispatchMode):
    """Names of our operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_kernels" and "lora_linear" in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Functions of torch that were called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def test_whoever_looks_at_operators_sees_them(monkeypatch):
    """An eager call runs a body in Python without torch's dispatcher, where nobody looks."""
    w, a, b = torch.randn(5, 16), *(torch.randn(s).requires_grad_() for s in ((2, 16), (5, 2)))
    names = [f"lora_kernels.lora_linear_{direction}_eager.default" for direction in BOTH]

    def step():
        lk.lora_linear(X, w, a, b, impl="eager").sum().backward()

    with Operators() as seen:
        step()
    assert seen.names == names
    with Functions() as functions:
        step()
    assert torch.ops.lora_kernels.lora_linear_forward_eager.default in functions.called
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as log:
        step()
    profiled = {event.name for event in log.events()}
    assert {name.replace(".", "::", 1).removesuffix(".default") for name in names} <= profiled
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (X, w, a, b)]

    def entered(*args):
        raise AssertionError("the body was called")

    monkeypatch.setattr(eager, "forward", entered)
    assert lk.lora_linear(*fakes, impl="eager").shape == (4, 5)  # a subclass, outside its mode
    with pytest.raises(AssertionError, match="the body"):
        step()


def test_a_joint_graph_can_be_differentiated_again():
    def step(x, w, a, b):
        y = lk.lora_linear(x, w, a, b, dropout_p=0.2, training=True, seed=3)
        return torch.autograd.grad(y.square().sum(), (x, a, b), create_graph=True)

    args = [torch.randn(s).requires_grad_() for s in ((4, 6), (5, 6), (2, 6), (5, 2))]
    graph = make_fx(step)(*args)

    def second(f):
        return torch.autograd.grad(sum(g.square().sum() for g in f(*args)), args)

    torch.testing.assert_close(second(graph), second(step), rtol=1e-4, atol=1e-3)


def test_eager_calls_never_enter_the_operators_autograd_kernels(monkeypatch):
    def entered(*args):
        raise AssertionError("an eager call entered an operator's autograd kernel")

    monkeypatch.setattr(linear, "is_recorded", entered)
    model = net(True, dropout=0.2)
    model(X).sum().backward()
    with torch.no_grad():
        model(X)
    assert all(use.fused == 2 for use in lk.report(model).layers.values())
    with pytest.raises(AssertionError, match="entered"):
        make_fx(model)(X)(X)


def test_a_trace_runs_where_the_package_is_not_imported(tmp_path):
    model = net(True)
    path = tmp_path / "traced.pt"
    torch.jit.save(torch.jit.trace(model, (X,)), path)
    torch.save(model(X).detach(), tmp_path / "y.pt")
    script = (
        "import sys, torch; m = torch.jit.load(sys.argv[1]); y = torch.load(sys.argv[2]);"
        "x = torch.linspace(-1, 1, 64).reshape(4, 16); assert 'lora_kernels' not in sys.modules;"
        "torch.testing.assert_close(m(x).detach(), y)"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path / "y.pt")], check=True, cwd=tmp_path
    )


def test_compiled_calls_are_fused_and_not_counted():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(n.target) for n in graph.graph.nodes])
        return graph

    model = net(True)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(3):
            model(X)  # counts move on
            torch.testing.assert_close(compiled(X), model(X))
    assert len(graphs) == 1
    assert sum("lora_linear_forward" in name for name in graphs[0]) == 2


def changing(model):
    """Yield inputs, and change the model's state in between as PEFT's users do."""
    layer = model.layers[0]
    yield X
    model.eval()
    yield X
    model.train()
    with torch.no_grad():
        yield X
    layer.scaling["default"] = 3.0  # a third number would be compiled in, too; PEFT's isn't
    yield X
    for shape in ((3, 16), (7, 16), (2, 3, 16)):
        yield torch.randn(shape)
    layer.enable_adapters(False)
    yield X
    layer.enable_adapters(True)
    layer.merge()
    yield X
    layer.unmerge()
    yield X


def test_a_layer_is_compiled_again_no_more_often_than_pefts():
    """Beyond eight graphs of one function torch raises, where `fullgraph` is asked for."""
    graphs = {False: [], True: []}
    for patch, seen in graphs.items():
        torch._dynamo.reset()

        def backend(graph, inputs, seen=seen):
            seen.append(graph)
            return graph

        model = net(patch)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        assert len([compiled(x) for x in changing(model)]) == 10
    assert len(graphs[True]) <= len(graphs[False]) <= 8


@pytest.mark.parametrize("kind", ["patched", "LoRALinear"])
def test_an_exported_model_under_transforms_and_flop_counts(kind):
    """Its operator's body is asked there, not the layer."""
    model = net(kind == "patched")
    if kind == "LoRALinear":
        model = nn.Sequential(lk.LoRALinear(16, 16, r=4), nn.Tanh(), lk.LoRALinear(16, 16, r=4))
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.lora_B.weight)
    captured = exported(model).module()
    for transform in (jvp, lambda f, x, v: (grad(lambda x: f(x).square().sum())(*x),)):
        pairs = zip(transform(captured, (X,), (X,)), transform(model, (X,), (X,)), strict=True)
        for one, other in pairs:
            assert_close(one, other)
    counts = []
    for each in (captured, model):
        with FlopCounterMode(display=False) as counter:
            each(X)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0

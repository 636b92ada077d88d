"""Tools that know torch's operators and not ours: results as of the unpatched model."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from tests.support.layers import make_base, peft_layer

pytest.importorskip("peft")
pytestmark = pytest.mark.unpoisoned


def model_of(kind, dtype=torch.float32):
    base = make_base(dtype=dtype)
    if kind != "LoRALinear":
        return peft_layer(base, kind == "patched")
    layer = lk.LoRALinear.from_linear(base, r=2, lora_alpha=3)
    nn.init.normal_(layer.lora_B.weight)
    return nn.Sequential(layer)


def count(f):
    with FlopCounterMode(display=False) as counter:
        out = f()
    return counter, out


@pytest.mark.parametrize("kind", ["patched", "LoRALinear"])
@pytest.mark.parametrize("part", ["forward", "backward", "step", "fake step"])
def test_flops_are_counted_as_pefts(part, kind):
    def flops(model):
        x = torch.randn(5, 6, requires_grad=True)
        if part == "forward":
            return count(lambda: model(x))[0].get_total_flops()
        if part == "backward":
            y = model(x).sum()
            return count(y.backward)[0].get_total_flops()
        if part == "step":
            return count(lambda: model(x).sum().backward())[0].get_total_flops()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            x = mode.from_tensor(x)
            return count(lambda: model(x).sum().backward())[0].get_total_flops()

    assert flops(model_of(kind)) == flops(model_of("peft")) > 0


def test_flops_of_each_module_are_counted():
    found = []
    for kind in ("peft", "patched"):
        model, x = model_of(kind), torch.randn(5, 6)
        counter, _ = count(lambda model=model, x=x: model(x).sum().backward())
        found.append(counter.get_flop_counts())
    assert found[1] == found[0]


@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
@pytest.mark.parametrize("kind", ["patched", "LoRALinear", "LoRALinear alone", "exported"])
def test_onnx(kind, dynamo, tmp_path):
    if kind == "exported" and not dynamo:
        pytest.skip("TorchScript's exporter takes modules alone")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = (
        model_of("patched" if kind == "exported" else kind.split()[0]).eval(),
        torch.randn(5, 6),
    )
    if kind == "LoRALinear alone":
        model = next(m for m in model.modules() if isinstance(m, lk.LoRALinear))
    expected, path = model(x), tmp_path / "model.onnx"
    if kind == "exported":
        model = torch.export.export(model, (x,))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=dynamo)
    session = runtime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), expected)


@pytest.mark.parametrize("kind", ["patched", "LoRALinear"])
def test_decomposed_programs_are_torchs_operators(kind):
    program = torch.export.export(model_of(kind), (torch.randn(5, 6),)).run_decompositions()
    names = {n.target.namespace for n in program.graph.nodes if n.op == "call_function"}
    assert names == {"aten"}


def test_symbolic_tracing_composes_a_lora_linear():
    """PEFT's layer, patched or not, can't be traced so."""
    model, x = model_of("LoRALinear"), torch.randn(5, 6)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


class Plain(torch.Tensor):
    """A subclass with torch's own __torch_function__."""


def nested(layout):
    rows = [torch.ones(2, 6), torch.ones(3, 6)]
    return torch.nested.nested_tensor(rows, layout=layout)


LAYOUTS = {
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "sparse COO": lambda: torch.eye(6).to_sparse(),
    "sparse CSR": lambda: torch.eye(6).to_sparse_csr(),
    "subclass": lambda: torch.ones(3, 6).as_subclass(Plain),
    "meta": lambda: torch.ones(3, 6, device="meta"),
}


def outcome(f, x):
    try:
        y = f(x)
    except Exception as error:
        return type(error)
    if y.is_nested:
        y = torch.cat(y.unbind())
    return type(y), (y.to_dense() if y.layout is not torch.strided else y)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*(prototype|beta):UserWarning")
def test_inputs_of_other_layouts_are_pefts(name):
    model = model_of("peft")
    patched = copy.deepcopy(model)
    lk.patch_peft(patched)
    theirs, ours = outcome(model, LAYOUTS[name]()), outcome(patched, LAYOUTS[name]())
    assert type(ours) is type(theirs)
    if isinstance(theirs, type):
        assert ours is theirs
    else:
        assert ours[0] is theirs[0]
        torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.parametrize("name", ["nested", "jagged", "sparse COO", "sparse CSR"])
def test_lora_linear_refuses_other_layouts_by_name(name):
    with pytest.raises(TypeError, match=r"^x: expected a dense tensor"):
        lk.lora_linear(LAYOUTS[name](), torch.ones(4, 6), torch.ones(2, 6), torch.ones(4, 2))

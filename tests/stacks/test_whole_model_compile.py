"""torch.compile, torch.export and AOTInductor of whole patched models."""

import zipfile

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from tests.stacks.models import (
    adapted_llama,
    assert_close,
    gradients,
    llama,
    patched_copy,
    tokens,
)

pytestmark = pytest.mark.unpoisoned

# Batch and length; the first two warm up: one static graph, one with symbolic sizes.
SHAPES = [(2, 24), (3, 31), (4, 40), (2, 17), (5, 29), (3, 64)]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def one_layer():
    return patched_copy(adapted_llama(base=llama(num_hidden_layers=1)))


def loss_of(model, rows):
    return model(input_ids=rows, labels=rows, use_cache=False).loss


class Graphs:
    """A backend that keeps how many fused layers each compiled graph holds."""

    def __init__(self, backend):
        self.compile, self.fused = torch._dynamo.lookup_backend(backend), []

    def __call__(self, graph, inputs):
        modules = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        targets = [str(node.target) for m in modules for node in m.graph.nodes]
        self.fused.append(sum("lora_linear_forward" in target for target in targets))
        return self.compile(graph, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "autocast", "tolerance"),
    [("aot_eager", False, 1e-4), ("aot_eager", True, 2e-2), ("inductor", False, 1e-4)],
    ids=["aot_eager", "autocast", "inductor"],
)
def test_training_in_one_graph_without_recompilation(backend, autocast, tolerance):
    """Batch and length change; after warm-up nothing is compiled again, and no graph breaks."""
    model = one_layer()
    graphs = Graphs(backend)
    compiled = torch.compile(loss_of, fullgraph=True, backend=graphs)

    def step(f, rows):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = f(model, rows)
        model.zero_grad()
        loss.backward()
        return loss, gradients(model)

    for index, shape in enumerate(SHAPES):
        rows = tokens(*shape)
        expected, theirs = step(loss_of, rows)
        with torch._dynamo.config.patch(error_on_recompile=index >= 2):
            loss, ours = step(compiled, rows)
        torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
        for name, grad in ours.items():
            assert_close(grad, theirs[name], tolerance, name)
    assert graphs.fused == [7, 7]


def test_switching_adapters_state_recompiles_rather_than_errs():
    model = one_layer()
    rows = tokens()
    compiled = torch.compile(Logits(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        adapted = compiled(rows)
        with model.disable_adapter():
            disabled = compiled(rows)
            assert_close(disabled, Logits(model)(rows))
        # By each token: the mean loss of both was the same to 1e-4 once.
        assert (adapted - disabled).abs().amax(-1).min() > 1e-2 * disabled.abs().max()
        assert_close(compiled(rows), adapted)


class Logits(torch.nn.Module):
    """What is exported: tokens in, logits out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, rows):
        return self.model(input_ids=rows, use_cache=False).logits


def exported(model):
    sizes = {0: torch.export.Dim("batch", max=16), 1: torch.export.Dim("length", max=64)}
    with torch.no_grad():
        return torch.export.export(Logits(model), (tokens(3, 20),), dynamic_shapes=(sizes,))


@pytest.mark.slow
def test_export_and_aot_inductor_of_an_inference_model(tmp_path):
    model = one_layer().eval().requires_grad_(False)
    program = exported(model)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("lora_kernels.lora_linear.default") == 7
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "m.pt2")
    )
    with zipfile.ZipFile(package) as files:
        code = [files.read(name) for name in files.namelist() if name.endswith((".cpp", ".json"))]
    assert sum(text.count(b"lora_linear_forward") for text in code) >= 7
    compiled = torch._inductor.aoti_load_package(package)
    torch.export.save(program, tmp_path / "saved.pt2")
    loaded = torch.export.load(tmp_path / "saved.pt2").module()
    for shape in ((3, 20), (5, 33), (2, 64)):
        rows = tokens(*shape)
        with torch.no_grad():
            expected = model(input_ids=rows, use_cache=False).logits
            assert_close(program.module()(rows), expected, 1e-4)
            assert_close(loaded(rows), expected, 1e-4)
            assert_close(compiled(rows), expected, 1e-4)


class Kinds(torch.nn.Module):
    """A layer of each kind that has one tensor for input and output."""

    def __init__(self):
        super().__init__()
        self.ids = torch.nn.Embedding(20, 16)
        self.linear = torch.nn.Linear(16, 16)
        self.conv = torch.nn.Conv1d(16, 16, 3)

    def forward(self, ids):
        return self.conv(self.linear(self.ids(ids)).transpose(1, 2))


@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}], ids=str)
def test_a_schedule_of_scaling_compiles_no_oftener_than_unpatched(settings):
    config = LoraConfig(
        r=4, target_modules=["linear", "conv", "ids"][: 1 if settings else 3],
        init_lora_weights=False, **settings,
    )  # fmt: skip
    model = get_peft_model(Kinds(), config)
    ids, counts = torch.randint(0, 20, (3, 5)), []
    for each in (model, patched_copy(model)):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(each, backend=counter)
        for scaling in (2.0, 3.0, 0.5, -1.0, 7.0):
            for layer in (m for m in each.modules() if isinstance(m, LoraLayer)):
                layer.scaling["default"] = scaling
            y = compiled(ids)
            assert_close(y, each(ids), 1e-5)
            y.sum().backward()
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0]

"""Reports name what runs a layer, what is missed, and which packed copies nobody reads."""

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import lora_kernels as lk
from lora_kernels import dispatch, native, serving
from lora_kernels.impl import gpu as gpus
from lora_kernels.impl.cpu import support as cpu
from lora_kernels.impl.cuda import support as cuda
from lora_kernels.impl.triton import support as triton
from lora_kernels.native import absence
from lora_kernels.operands.request import Request
from lora_kernels.prepack import reason_left
from lora_kernels.serving import missed_part, request_of, served

peft = pytest.importorskip("peft")

FIRST, SECOND = "base_model.model.0", "base_model.model.1"
ABSENT = "not built when the package was installed: no C++ compiler on PATH"
needs_part = pytest.mark.skipif(absence("cpu") is not None, reason="needs the compiled CPU part")
needs_packing = pytest.mark.skipif(
    reason_left(torch.empty(8, 8)) is not None, reason="nothing can be packed here"
)


def two(dtype=torch.float32, **config):
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    settings = {"r": 2, "target_modules": ["0", "1"], **config}
    return peft.get_peft_model(base, peft.LoraConfig(**settings), autocast_adapter_dtype=False)


def by_cpu():
    return f"cpu ({torch.ops.lora_kernels.cpu_isa()})"


def logged(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


@pytest.fixture
def without_the_part(monkeypatch):
    """A CPU part that was not built; choices that are kept are forgotten."""

    def forget():
        dispatch._cached_choice.cache_clear()

    forget()
    for module in (cpu, cuda, serving):
        monkeypatch.setattr(module, "absence", lambda part: ABSENT)
    yield
    monkeypatch.undo()
    forget()


@needs_part
def test_the_report_names_what_runs_the_layers(caplog):
    caplog.set_level(logging.INFO, "lora_kernels")
    model = two()
    report = lk.patch_peft(model)
    assert report.implementations == dict.fromkeys((FIRST, SECOND), by_cpu())
    assert not report.without_kernel
    line = f"lora_kernels: 2 LoRA layers patched, 0 left; run by {by_cpu()}"
    assert str(report) == line
    assert logged(caplog, logging.INFO) == [line]
    assert not logged(caplog, logging.WARNING)
    use = lk.report(model).layers[FIRST]
    assert (use.impl, use.without_kernel) == (by_cpu(), None)
    assert f"2 of 2 LoRA layers fused now, run by {by_cpu()}; calls" in str(lk.report(model))


@needs_part
def test_layers_that_differ_are_grouped():
    model = two(rank_pattern={"1": cpu.MAX_RANK + 1})
    reason = f"cpu: needs a rank of at most {cpu.MAX_RANK}, got {cpu.MAX_RANK + 1}"
    report = lk.patch_peft(model)
    assert report.without_kernel == {SECOND: reason}
    groups = [f"  run by {by_cpu()}: {FIRST}", f"  run by eager ({reason}): {SECOND}"]
    headline, *lines = str(report).splitlines()
    assert headline.endswith(f"2 LoRA layers patched, 0 left; run by {by_cpu()} in 1, eager in 1")
    assert lines == groups
    assert str(lk.report(model)).splitlines()[1:] == groups


@needs_part
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_dtype_without_a_kernel_is_the_reason(dtype):
    report = lk.patch_peft(two(dtype))
    assert report.implementations[FIRST] == "eager"
    assert f"run by eager (cpu: needs bfloat16 or float32, got {dtype}): {FIRST}" in str(report)
    with torch.autocast("cpu", torch.bfloat16):
        report = lk.patch_peft(two(dtype))  # float64 is left as it is
    assert report.implementations[FIRST] == (by_cpu() if dtype == torch.float16 else "eager")


def test_a_named_implementation_is_named():
    model = two()
    assert lk.patch_peft(model, impl="reference").implementations[SECOND] == "reference"
    assert lk.report(model).layers[SECOND].impl == "reference"
    model.merge_adapter()
    assert lk.report(model).layers[SECOND].impl is None


def test_nothing_patched_is_warned_of(caplog):
    report = lk.patch_peft(two(alora_invocation_tokens=[1]))
    assert not report.implementations
    (warning,) = logged(caplog, logging.WARNING)
    reason = "LoRA variant ALoraLinearVariant: aLoRA adapts the tokens after its invocation"
    assert warning == f"0 of 2 LoRA layers patched: {reason} (2)"


def test_an_absent_part_is_warned_of_with_the_cure(without_the_part, caplog):
    report = lk.patch_peft(two())
    assert f"run by eager (cpu: {ABSENT}): {FIRST}, {SECOND}" in str(report)
    (warning,) = logged(caplog, logging.WARNING)
    assert warning == (
        f"the compiled CPU part is absent, {ABSENT}; cure: install lora_kernels again where a C++ "
        "compiler is on PATH"
    )


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float16, {}), (torch.float32, {"impl": "eager"}), (torch.float32, {"impl": "auto"})],
    ids=["it serves no float16", "not asked for", "merged"],
)
def test_a_part_that_is_not_missed_is_no_matter(dtype, options, without_the_part, caplog):
    model = two(dtype)
    if options == {"impl": "auto"}:
        model.merge_adapter()
    lk.patch_peft(model, **options)
    assert "absent" not in caplog.text


def test_a_gpu_misses_its_part_where_no_triton_serves(without_the_part, monkeypatch):
    gpu = Request("lora_linear", torch.device("cuda", 0), torch.bfloat16, 16, False)
    monkeypatch.setattr(gpus, "capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "absence", lambda: triton.NO_TRITON)
    triton._launcher_refusal.cache_clear()
    assert served("auto", gpu) == ("eager", f"triton: triton is not installed; cuda: {ABSENT}")
    assert "cure: install triton, or" in missed_part([gpu])
    assert missed_part([gpu._replace(rank=300)]) is None
    assert served("auto", gpu._replace(dropout=True)).by == "eager, with dropout PEFT"
    monkeypatch.setattr(triton, "_launcher_refusal", lambda: None)
    dispatch._cached_choice.cache_clear()
    assert served("auto", gpu) == ("triton", None)
    assert missed_part([gpu]) is None


def test_a_device_of_which_nobody_has_kernels():
    request = Request("lora_linear", torch.device("mps"), torch.float16, 16, False)
    assert served("auto", request) == ("eager", "no kernels for mps")
    assert missed_part([request]) is None


def classes(model):
    return [(type(module), sorted(vars(module))) for module in model.modules()]


@pytest.mark.parametrize(
    ("impl", "config", "reason"),
    [
        ("cuda", {}, "needs a CUDA device, got cpu"),
        ("triton", {}, "needs a CUDA device, got cpu"),
        ("cpu", {"dtype": torch.float64}, "needs bfloat16 or float32, got torch.float64"),
        ("cpu", {"rank_pattern": {"1": 300}}, "needs a rank of at most 256, got 300"),
    ],
)
@pytest.mark.parametrize("state", ["fused", "patched before", "merged"])
def test_an_implementation_that_cannot_serve_is_refused(state, impl, config, reason, caplog):
    caplog.set_level(logging.INFO, "lora_kernels")
    model = two(**config)
    if state == "patched before":
        lk.patch_peft(model, impl="eager")
        caplog.clear()
    if state == "merged":
        model.merge_adapter()
    before = classes(model)
    with pytest.raises(ValueError, match=rf"^impl: expected .*, got '{impl}': {reason} \(base_mo"):
        lk.patch_peft(model, impl=impl)
    assert classes(model) == before
    assert not caplog.records


def test_what_lies_nowhere_yet_is_not_asked():
    """On meta a model may go anywhere; shards of FSDP1 and ZeRO-3 say neither shape nor place."""
    report = lk.patch_peft(two().to("meta"), impl="cuda")
    assert len(report.patched) == 2
    assert not report.implementations
    assert str(report) == "lora_kernels: 2 LoRA layers patched, 0 left"
    with FakeTensorMode():
        fake = torch.empty(8, 8, device="cuda")
    for weight in (torch.empty(0), torch.empty(32), fake):
        layer = nn.Linear(8, 8)
        layer.weight = nn.Parameter(weight)
        assert request_of(layer, 2, False) is None


def test_a_layer_that_moved_away_from_its_implementation_is_said():
    model = two()
    lk.patch_peft(model, impl="eager")
    vars(model.base_model.model[0])["_lora_kernels_impl"] = "triton"  # as if moved from a GPU
    found = lk.report(model).layers[FIRST]
    assert (found.impl, found.without_kernel) == (
        "triton, which raises",
        "needs a CUDA device, got cpu",
    )


def test_the_packages_own_layers_say_what_runs_them():
    model = nn.Sequential(lk.LoRALinear(8, 8, r=2, impl="reference"), lk.LoRALinear(8, 8))
    uses = lk.report(model).layers
    assert uses["0"].impl == "reference"
    assert uses["1"].impl == ("eager" if absence("cpu") else by_cpu())


@needs_packing
@pytest.mark.parametrize("kind", ["patched", "LoRALinear"])
def test_copies_that_calls_do_not_read_are_unused(kind):
    x = torch.randn(4, 8)
    if kind == "patched":
        model, path = two(), FIRST
        lk.patch_peft(model, prepack=True)
    else:
        model, path = nn.Sequential(lk.LoRALinear(8, 8)), "0"
        lk.prepack_(model)

    def packed():
        return lk.report(model).layers[path].packed

    assert packed() == "packed"
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    unused = "unused: the last call ran by cpu in torch.bfloat16, the copies are torch.float32"
    assert packed() == unused
    assert f"weight copies ({unused}): {path}" in str(lk.report(model))
    model(x)
    assert packed() == "packed"
    model.to(torch.float64)  # seen before a call sees it
    assert packed() == "lost: the weight was replaced, moved or changed; call prepack_ again"
    model(x.double())
    assert packed() == "lost: the weight was replaced, moved or changed; call prepack_ again"


@needs_packing
def test_copies_beside_another_implementation_are_unused():
    model = two()
    lk.patch_peft(model, impl="eager", prepack=True)
    assert lk.report(model).layers[FIRST].packed == "unused: calls run by eager"


@needs_packing
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_copies_beside_compiled_graphs_are_unused(how):
    model = two()
    lk.patch_peft(model, prepack=True)
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    model(torch.randn(2, 8))
    (found,) = {use.packed for use in lk.report(model).layers.values()}
    assert found == "unused: calls run by compiled graphs"
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [lk.patch_peft, lk.report], ids=["PatchReport", "UsageReport"])
def test_notebooks_show_a_table_of_escaped_text(make):
    model = two()
    model.base_model.model.add_module("<b>", model.base_model.model[0])
    layer = model.base_model.model[1]
    layer.scaling["default"] = type("<script>", (), {})()
    lk.patch_peft(model)
    html = make(model)._repr_html_()
    assert html.startswith("<table><caption>lora_kernels: ")
    assert html.count("<table>") == html.count("</table>") == 1
    assert "scaling is a &lt;script&gt;" in html
    assert "<script>" not in html
    assert "<tr><td>1</td><td>run by " in html


@needs_packing
def test_notebooks_show_what_was_packed():
    html = lk.patch_peft(two(), prepack=True)._repr_html_()
    assert html.count("<table>") == 2
    assert "2 weights packed" in html


@pytest.mark.slow
@pytest.mark.skipif(not native.BUILT["cpu"], reason="needs the compiled CPU part")
def test_no_triton_is_imported_to_patch_a_cpus_model():
    code = (
        "import sys, torch, peft, lora_kernels as lk\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'triton']:\n"
        "    del sys.modules[name]\n"  # what others imported
        "model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)),\n"
        "                            peft.LoraConfig(target_modules=['0']))\n"
        "assert lk.patch_peft(model).patched\n"
        "lk.report(model)\n"
        "assert 'triton' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.IA3Config(target_modules=["0"], feedforward_modules=[]), "IA3"),
        (peft.LoHaConfig(target_modules=["0"]), "LOHA"),
    ],
    ids=["IA3", "LoHa"],
)
@pytest.mark.parametrize("function", [lk.patch_peft, lk.report])
def test_peft_models_of_other_kinds_are_named(function, config, kind):
    model = nn.Sequential(peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config))
    with pytest.raises(ValueError, match=rf"got a PEFT model without LoRA layers \({kind}\)$"):
        function(model)


@pytest.mark.parametrize("function", [lk.patch_peft, lk.report])
def test_a_model_whose_layers_were_unloaded_is_named(function):
    model = two()
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match=r"none in PeftModel: its LoRA layers were merged and unl"):
        function(model)
    with pytest.raises(ValueError, match=r"none in Sequential \(call peft.get_peft_model first; m"):
        function(merged)


@pytest.mark.parametrize(
    ("function", "method"),
    [(lk.save_adapter, "model.save_pretrained"), (lk.load_adapter, "model.load_adapter")],
)
def test_files_of_a_peft_model_are_pefts(function, method, tmp_path):
    with pytest.raises(ValueError, match=rf"got PEFT's in PeftModel \(use {method}\)"):
        function(two(), tmp_path)

"""Which implementation serves a GPU's calls, asked without a GPU."""

import re
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

import lora_kernels as lk
from lora_kernels import dispatch
from lora_kernels.dispatch import (
    CHOICES,
    choose,
    few_rows_slower_than_peft,
    passed_over,
    refusal,
    slower_than_peft,
)
from lora_kernels.impl import gpu as gpus
from lora_kernels.impl.cuda import support as cuda
from lora_kernels.impl.triton import support
from lora_kernels.operands.request import Request
from lora_kernels.serving import served
from tests.support.paths import ROOT

GPU = torch.device("cuda", 0)


def _request(**fields):
    made = Request("lora_linear", GPU, torch.bfloat16, 16, True)
    return made._replace(**fields)


@pytest.mark.parametrize("impl", CHOICES[1:])
def test_what_of_a_call_an_implementation_has_not(impl):
    request = Request("lora_linear", torch.device("cpu"), torch.float32, 16, False)
    assert refusal(impl, request._replace(op="toy")) == "has no toy"
    assert "got awq" in refusal(impl, request._replace(format="awq"))
    # W itself is there: who doesn't know the format reads that.
    assert refusal(impl, request._replace(format="onednn")) == refusal(impl, request)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a compute capability, with Triton in order; answers that are kept are forgotten."""
    kept = (dispatch._cached_choice, dispatch._cached_without_kernel, support._launcher_refusal)

    def forget():
        for function in kept:
            function.cache_clear()

    def make(*capability):
        forget()
        monkeypatch.setattr(gpus, "capability", lambda device: capability)

    yield make
    monkeypatch.undo()
    forget()


def _triton(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    return triton


@pytest.mark.parametrize("capability", [(8, 0), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 1)])
def test_known_gpus_are_tritons(gpu, capability, monkeypatch):
    _triton(monkeypatch)
    gpu(*capability)
    assert choose("auto", _request()).name == "triton"
    assert slower_than_peft(_request()) is None


@pytest.mark.parametrize("capability", [(7, 5), (11, 0), (13, 0)])
def test_unknown_generations_are_refused(gpu, capability, monkeypatch):
    _triton(monkeypatch)
    gpu(*capability)
    got = f"got {capability[0]}.{capability[1]}"
    assert got in passed_over(_request())["triton"]
    with pytest.raises(ValueError, match=f"'triton' can't serve this call: .*{got}"):
        choose("triton", _request())
    assert choose("auto", _request()).name in ("cuda", "eager")


def test_triton_without_a_c_compiler(gpu, monkeypatch, tmp_path):
    triton = _triton(monkeypatch)
    gpu(9, 0)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "expected gcc or clang on PATH" in passed_over(_request())["triton"]
    assert choose("auto", _request()).name != "triton"
    for name in ("clang", "of-its-own"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
        if name == "of-its-own":
            monkeypatch.setenv("CC", "nothing")
            support._launcher_refusal.cache_clear()
            assert "expected nothing on PATH" in passed_over(_request())["triton"]
            monkeypatch.setenv("CC", name)
        support._launcher_refusal.cache_clear()
        assert "triton" not in passed_over(_request())
    monkeypatch.setenv("CC", "nothing")
    monkeypatch.setattr(triton.knobs.build, "impl", print)
    support._launcher_refusal.cache_clear()
    assert "triton" not in passed_over(_request())


def test_triton_interpreted_or_too_old(gpu, monkeypatch):
    triton = _triton(monkeypatch)
    gpu(9, 0)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert "TRITON_INTERPRET" in passed_over(_request())["triton"]
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for version, refused in (("3.5.1", True), ("3.6.0", False), ("3.8.0+git1", False)):
        monkeypatch.setattr(triton, "__version__", version)
        support._launcher_refusal.cache_clear()
        assert ("triton" in passed_over(_request())) == refused


def test_without_triton(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(support, "_has_triton", lambda: False)
    assert passed_over(_request())["triton"] == "triton is not installed"


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_auto_leaves_what_has_not_run_on_a_gpu(gpu, form, monkeypatch):
    """Compiled CUDA decodes W where it is named; "auto" goes on to "eager" where Triton isn't."""
    gpu(9, 0)
    monkeypatch.setattr(cuda, "absence", lambda part: None)
    monkeypatch.setattr(support, "_has_triton", lambda: False)
    request = _request(format=form)
    assert refusal("cuda", request) is None
    assert choose("cuda", request).name == "cuda"
    assert choose("auto", request).name == "eager"
    assert "haven't run on a GPU" in passed_over(request)["cuda"]
    assert "haven't run on a GPU" in slower_than_peft(request)
    assert f"{form} haven't run on a GPU" in served("auto", request).without_kernel
    assert choose("auto", _request()).name == "cuda"
    assert "cuda" not in passed_over(_request())


@pytest.mark.parametrize(
    ("capability", "fields"),
    [
        ((7, 5), {}),
        ((7, 0), {"dtype": torch.float16}),
        ((9, 0), {"rank": 257}),
        ((9, 0), {"dtype": torch.float64}),
        ((9, 0), {"device": torch.device("mps")}),
        ((9, 0), {"device": torch.device("xpu", 0)}),
    ],
    ids=str,
)
def test_nobody_gets_slower_by_dropout_without_a_kernel(gpu, capability, fields, monkeypatch):
    _triton(monkeypatch)
    gpu(*capability)
    request = _request(**fields)
    reason = slower_than_peft(request)
    assert reason.startswith("dropout without a kernel (triton needs ")
    assert slower_than_peft(request) == reason
    assert slower_than_peft(request._replace(dropout=False)) is None
    assert choose("eager", request).name == "eager"  # by name it still serves


def test_explain_says_where_a_patched_layer_keeps_pefts_forward(gpu, monkeypatch):
    _triton(monkeypatch)
    gpu(7, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = ((600, 32), (16, 32), (8, 32), (16, 8))
        tensors = [torch.empty(shape, device="cuda", dtype=torch.float16) for shape in shapes]
        dropped = lk.explain(*tensors, dropout_p=0.1, training=True)
        plain = lk.explain(*tensors)
    assert dropped.choice == plain.choice == "eager"
    assert "PEFT's forward: dropout without a kernel (triton needs " in str(dropped)
    assert plain.peft is None
    assert "PEFT" not in str(plain)


def _few(rows=512, dtype=torch.bfloat16, adapters=torch.bfloat16, **named):
    """Return what `explain` says of a layer on a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, rows // 2, 32, device="cuda", dtype=dtype)
        weight = torch.empty(16, 32, device="cuda", dtype=dtype)
        lora_A, lora_B = (torch.empty(s, device="cuda", dtype=adapters) for s in ((8, 32), (16, 8)))
        return lk.explain(x, weight, lora_A, lora_B, **named)


def test_few_rows_with_16_bit_adapters_are_pefts(gpu, monkeypatch):
    """As an H200 measured it, where PEFT's aren't the faster ones a layer is fused."""
    monkeypatch.setattr(support, "_has_triton", lambda: False)
    gpu(9, 0)
    assert "at most 512 rows with 16-bit adapters" in _few().peft
    assert "at most 512 rows with 16-bit adapters" in _few(dropout_p=0.1, training=True).peft
    assert _few(514).peft is None
    assert _few(adapters=torch.float32).peft is None
    assert _few(dtype=torch.float32, adapters=torch.float32).peft is None
    with FakeTensorMode():
        x = torch.empty(4, 32, device="cuda")
    assert few_rows_slower_than_peft(x, torch.bfloat16, torch.bfloat16) is None  # under autocast


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_cpu_is_no_matter(dtype):
    assert slower_than_peft(Request("lora_linear", torch.device("cpu"), dtype, 300, True)) is None


def test_the_versions_of_triton_that_readme_names():
    """From the oldest that is served to the one that these tests run with."""
    oldest = ".".join(map(str, support.OLDEST_TRITON))
    pinned = re.search(r"^triton==(\d+\.\d+)", (ROOT / "requirements-dev.txt").read_text(), re.M)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"`triton` ({oldest} to {pinned[1]}, " in readme

"""The kernels for sm_90a: their PTX, compiled here, in a virtual machine that models Hopper."""

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

import lora_kernels as lk
from lora_kernels._cuda import machine
from lora_kernels._cuda.machine import Machine, using
from lora_kernels._native import absence
from lora_kernels.testing import Case, assert_parity, make_inputs

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = pytest.mark.skipif(
    absence("cuda") is not None
    or shutil.which("nvcc") is None
    or importlib.util.find_spec("ptxvm") is None,
    reason="needs the compiled CUDA part, nvcc and the PTX virtual machine (module ptxvm)",
)
OPTIONS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-arch=sm_90a", "-w")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """PTX and ptxas's report of both element types."""
    folder = tmp_path_factory.mktemp("sm_90a")
    texts, reports = [], []
    for name in ("bf16", "half"):
        source, out = str(SOURCES / f"kernels_sm90_{name}.cu"), str(folder / name)
        options = ["nvcc", *OPTIONS, source]
        subprocess.run([*options, "-ptx", "-o", f"{out}.ptx"], check=True)
        said = [*options, "-cubin", "-Xptxas", "-v", "-o", f"{out}.cubin"]
        reports.append(subprocess.run(said, check=True, capture_output=True, text=True).stderr)
        texts.append(Path(f"{out}.ptx").read_text())
    head, bf16 = texts[0].split(".address_size 64")
    return head + ".address_size 64\n" + bf16 + texts[1].split(".address_size 64")[1], reports


@pytest.fixture
def hopper(compiled, monkeypatch):
    """A machine's sm_90a, beside the library's own code for sm_80."""
    import ptxvm

    code = cache(
        lambda target: ptxvm.load(compiled[0] if target == "sm_90a" else machine.ptx(target))
    )
    monkeypatch.setattr(machine, "_code", code)

    def make(**how):
        return Machine(arch=90, shared_bytes=232448, **how)

    return make


def test_compiled_without_spills_by_asynchronous_products(compiled):
    text, reports = compiled
    assert text.count("wgmma.mma_async") > 0
    assert text.count("setmaxnreg.dec") == text.count("setmaxnreg.inc") == 8
    for report in reports:
        assert len(re.findall("Compiling entry function", report)) == 4
        assert set(re.findall(r"(\d+) bytes stack frame", report)) == {"0"}
        assert "setmaxnreg ignored" not in report
        assert "serialize" not in report


CASES = [
    Case((300,), 384, 200, 16, BF16),
    Case((300,), 384, 200, 16, BF16, dropout_p=0.1, bias=True),
    Case((129,), 264, 136, 5, FP16, FP32, 0.1),
    Case((250,), 250, 1096, 8, BF16, bias=True),
    Case((120,), 512, 64, 64, FP16, dropout_p=0.1),
    Case((300,), 384, 384, 24, BF16, FP32, 0.1, bias=True),
    Case((2, 120), 248, 8, 1, BF16, dropout_p=0.1),
    Case((128,), 251, 328, 50, FP16, bias=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(hopper, case):
    for resident in (1, 3):
        made = hopper(resident=resident, seed=resident, zeros=torch.zeros(4096, dtype=torch.int32))
        with using(made):
            for _ in range(2):
                assert_parity(case, make_inputs(case), "cuda")
        assert not made.zeros.any()
        names = [name for name, _ in made.stats if "forward" in name]
        assert len(names) == 2
        assert all("_Hopper_" in name for name in names)


def test_shared_memory_has_no_conflicts(hopper):
    made = hopper(resident=2)
    x, w = torch.randn(256, 512, dtype=BF16), torch.randn(512, 512, dtype=BF16)
    a, b = torch.randn(16, 512, dtype=BF16), torch.randn(512, 16, dtype=BF16)
    with using(made):
        lk.lora_linear(x, w, a, b, impl="cuda")
    name, stats = made.stats[0]
    assert "_Hopper_" in name
    assert stats.shared_bank_conflicts == 0

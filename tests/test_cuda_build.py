"""How the compiled CUDA part is built, and what ptxas made of it."""

import importlib.util
from pathlib import Path

import pytest

from lora_kernels._cuda.inspect import Report, reports
from lora_kernels._native import LIBRARIES, absence

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "csrc" / "cuda" / "build.py"
KNOWN = {80, 86, 89, 90, 100, 103, 120, 121}


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("cuda_build", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_architectures_are_named_once(build):
    for archs, flags in (
        ("8.0+PTX;9.0 12.0", ["80,code=[sm_80,sm_90a,compute_80]", "120,code=[sm_120]"]),
        ("8.9;8.6+PTX", ["80,code=[sm_89,sm_86,compute_80]"]),
        ("9.0a+PTX", ["80,code=[sm_90a,compute_80]"]),
        ("9.0a,9.0;12.1", ["80,code=[sm_90a]", "120,code=[sm_121]"]),
        ("10.0a;10.3", ["80,code=[sm_100a,sm_103]"]),
    ):
        made = build.arch_flags(build.usable(archs, KNOWN))
        assert made == [f"-gencode=arch=compute_{flag}" for flag in flags]
    assert " ".join(build.arch_flags(build.usable(build.ARCHS, KNOWN))).count("sm_") == 7


@pytest.mark.parametrize("wrong", ["sm_80", "9", "8.0+ptx"])
def test_what_is_no_architecture_is_named(build, wrong):
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST: expected entries like"):
        build.usable(wrong, KNOWN)


def test_it_is_left_out_for_one_reason_at_a_time(build, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CUDA", "0")
    assert build.left_out_reason() == "LORA_KERNELS_CUDA=0"
    monkeypatch.delenv("LORA_KERNELS_CUDA")
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.left_out_reason() == "no nvcc on PATH"


def test_a_fault_is_said():
    good = Report("sm_80", "lora_forward_Large_bf16_r16_d0_c1", 200, 0, "64 HMMA")
    assert good.fault is None
    assert Report("sm_80", good.kernel, 255, 8, "64 HMMA").fault == "spills 8 bytes"
    assert Report("sm_80", good.kernel, 200, 0, "10 FFMA").fault == "no HMMA"
    assert Report("sm_80", "lora_decode_float", 200, 0, "64 FFMA").fault is None
    assert Report("sm_80", "lora_decode_tf32", 200, 0, "64 FFMA").fault == "no HMMA"
    assert Report("sm_80", "lora_decode_tf32", 200, 0, "64 HMMA").fault is None


@pytest.mark.skipif(
    absence("cuda") is not None or importlib.util.find_spec("triton") is None,
    reason=f"compiled CUDA part: {absence('cuda') or 'needs Triton for its cuobjdump'}",
)
def test_no_kernel_spills_and_all_use_the_tensor_cores():
    found = reports(LIBRARIES["cuda"])
    assert len(found) > 60
    assert [report for report in found if report.fault] == []

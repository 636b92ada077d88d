"""How the compiled CUDA part is built, and what ptxas made of it."""

import importlib.util
import shutil
import subprocess

import pytest

from lora_kernels.impl.cuda.tools.inspect import Report, reports
from lora_kernels.impl.cuda.tools.loops import loops
from lora_kernels.native import LIBRARIES, absence
from tests.support.paths import ROOT

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
    assert Report("sm_80", "lora_few_rows_float", 200, 0, "64 FFMA").fault is None
    assert Report("sm_80", "lora_few_rows_tf32", 200, 0, "64 FFMA").fault == "no HMMA"
    assert Report("sm_80", "lora_few_rows_tf32", 200, 0, "64 HMMA").fault is None
    assert Report("sm_80", "lora_few_rows_nested_half", 254, 0, "9 FMUL").fault == "no HMMA"
    assert Report("sm_80", "lora_decode_nested_half", 40, 0, "").fault is None


SASS = """
	code for sm_80
		Function : some
        /*0000*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;  /* 0x1 */
        /*0010*/                   LDSM.16.M88.4 R4, [R1] ;              /* 0x2 */
        /*0020*/                   LDSM.16.M88.4 R4, [R1] ;              /* 0x2 */
        /*0030*/             @!PT  LDS RZ, [RZ] ;                        /* 0x3 */
        /*0040*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64], P4 ;
        /*0050*/              @P2  HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/              @!P0 BRA 0x90 ;
        /*0080*/              @P0  BRA 0x10 ;
        /*0090*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00a0*/              @P0  BRA 0x90 ;
        /*00b0*/              @P1  BRA 0x0 ;
        /*00c0*/                   BRA 0xc0;
"""


def test_main_loops_are_counted():
    """The innermost loops with matrix instructions, of all that branches lead back to."""
    (loop,) = loops(SASS)
    assert (loop.arch, loop.kernel, loop.matrix) == ("sm_80", "some", 1)
    assert loop.wavefronts == 3 * 4
    cells = "| sm_80 | some | 8 | 1 | 8.000 | 2 | 12.000 | 1 | 512 | 1 | 2 | 1 |"
    assert loop.row() == cells


WAITING_SASS = """
	code for sm_90a
		Function : other
        /*0000*/                   ULEA UR16, UR6, UR10, 0x3 ;
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR16], R4 ;
        /*0020*/              @!P0 BRA 0x10 ;
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0040*/               @P1 BRA 0x0 ;
        /*0050*/                   BRA 0x50;
"""


def test_a_wait_in_a_main_loop_is_no_loop_of_its_own():
    (loop,) = loops(WAITING_SASS)
    assert (loop.kernel, loop.matrix, loop.counts.total()) == ("other", 1, 5)


@pytest.mark.skipif(
    absence("cuda") is not None or importlib.util.find_spec("triton") is None,
    reason=f"compiled CUDA part: {absence('cuda') or 'needs Triton for its cuobjdump'}",
)
def test_no_kernel_spills_and_all_use_the_tensor_cores():
    found = reports(LIBRARIES["cuda"])
    assert len(found) > 60
    assert [report for report in found if report.fault] == []


# What every shared library has for the start of its own code, and, tested before they are called,
# what only a torch with oneDNN has.
WEAK = {
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
    "__cxa_finalize",
    "__gmon_start__",
}
WEAK_BY_PART = {
    "cuda": set(),
    "cpu": {"aoti_torch_cpu__linear_pointwise", "aoti_torch_cpu__linear_pointwise_binary"},
}


@pytest.mark.parametrize("part", WEAK_BY_PART)
def test_no_symbol_is_left_to_chance(part):
    """A weak symbol that no needed library has is null, and a call of it a jump to nowhere."""
    if absence(part) is not None or shutil.which("nm") is None:
        pytest.skip(f"compiled part: {absence(part) or 'needs nm'}")
    command = ["nm", "--dynamic", "--undefined-only", "--format=posix", LIBRARIES[part]]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kinds = [line.split()[:2] for line in output.splitlines()]
    weak = {name.split("@")[0] for name, kind in kinds if kind in "wv"}
    assert weak - WEAK <= WEAK_BY_PART[part]


# Functions that torch 2.10, the oldest that is served, doesn't have yet: none may be needed.
LATER = {"aoti_torch_dtype_float8_e8m0fnu"}


@pytest.mark.parametrize("part", WEAK_BY_PART)
def test_the_oldest_torch_has_every_function(part):
    if absence(part) is not None or shutil.which("nm") is None:
        pytest.skip(f"compiled part: {absence(part) or 'needs nm'}")
    command = ["nm", "--dynamic", "--undefined-only", "--format=posix", LIBRARIES[part]]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert not LATER & {line.split()[0].split("@")[0] for line in output.splitlines()}


STREAM = "aoti_torch_get_current_cuda_stream"
TORCH_CUDA = f"""
extern "C" int {STREAM}(int device, void** stream) {{
  *stream = reinterpret_cast<void*>(1000ul + device);
  return device == 3 ? FAILS : 0;
}}
"""


COMPILE = ("c++", "-std=c++20", "-x", "c++")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """What looks for the stream, without torch and CUDA."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    made = tmp_path_factory.mktemp("stream") / "stream"
    host = SCRIPT.parent / "host"
    sources = [ROOT / "tests" / "native" / "stream.cpp", host / "stream.cpp"]
    subprocess.run([*COMPILE, f"-I{host}", *sources, "-ldl", "-o", made], check=True)
    return made


@pytest.mark.parametrize(
    ("soname", "source", "printed"),
    [
        ("libtorch_cuda.so", TORCH_CUDA.replace("FAILS", "0"), "1003"),
        ("libtorch_cuda.so", TORCH_CUDA.replace("FAILS", "1"), f"{STREAM} of device 3 failed"),
        ("libtorch_cuda.so", "int other;", f"expected {STREAM} in libtorch_cuda.so: "),
        ("libtorch_cpu.so", "int other;", "expected libtorch_cuda.so among the loaded libraries"),
    ],
    ids=["there", "fails", "another torch", "no CUDA build"],
)
def test_the_current_stream_is_looked_up_in_what_is_loaded(
    program, soname, source, printed, tmp_path
):
    """The library is loaded locally, as torch's are, and no need of this one."""
    library = tmp_path / soname
    shared = [*COMPILE, "-", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", library]
    subprocess.run(shared, input=source, text=True, check=True)
    done = subprocess.run([program, library], capture_output=True, text=True)
    assert done.returncode == (0 if printed == "1003" else 1), done
    assert printed in done.stdout

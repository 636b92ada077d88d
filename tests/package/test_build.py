"""How the package is built: what is left out and why, by stand-ins for compilers."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels import native
from tests.support.paths import ROOT

ABI = ROOT / "csrc" / "torch_abi"
# Notes its arguments and writes what -o names.
COMPILER = """#!/bin/sh
echo "$@" >> {folder}/calls
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""
BROKEN = """#!/bin/sh
echo "simd.inc:9: note: some note" >&2
echo "simd.inc:10:3: error: unknown type name '__m512bh'" >&2
exit 1
"""
NVCC = """#!/bin/sh
case $1 in
--version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
--list-gpu-arch) {listed} ;;
--dryrun) echo '#$ TOP={folder}' >&2 ;;
*) exit 1 ;;
esac
"""


@pytest.fixture
def source(tmp_path):
    """A copy of what is built, and a function that builds it."""
    copy = tmp_path / "source"
    left = shutil.ignore_patterns("*.so", "_left_out.json", "__pycache__")
    for name in ("csrc", "lora_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=left)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "lora_kernels_auto.py"):
        shutil.copy(ROOT / name, copy)

    def build(**variables):
        given = {k: v for k, v in os.environ.items() if not k.startswith("LORA_KERNELS_")}
        command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib")]
        return subprocess.run(
            command, cwd=copy, env={**given, "LORA_KERNELS_CUDA": "0", **variables},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return build


def _program(path, text, **fields):
    path.write_text(text.format(folder=path.parent, **fields) if fields or "{" in text else text)
    path.chmod(0o755)
    return str(path)


def _built(tmp_path):
    folder = tmp_path / "lib" / "lora_kernels"
    reasons = json.loads((folder / "_left_out.json").read_text())
    return reasons, {path.name for path in folder.glob("*.so")}


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/bin/false", "/bin/false failed: it said nothing"),
        ("nonsuch-c++ -m64", "no C++ compiler: nonsuch-c++ is not on PATH"),
        (BROKEN, "c++ failed: simd.inc:10:3: error: unknown type name '__m512bh'"),
    ],
)
def test_a_part_that_cannot_be_built_is_left_out(source, tmp_path, compiler, reason):
    if compiler is BROKEN:
        compiler = _program(tmp_path / "c++", BROKEN)
    done = source(CXX=compiler)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "the CPU part:" in line]
    assert line.startswith("lora_kernels: built without the CPU part: ")
    assert line.endswith(reason)
    assert "built with the" not in done.stderr
    assert "Traceback" not in done.stderr
    reasons, libraries = _built(tmp_path)
    assert reasons["cpu"].endswith(reason)
    assert reasons["cuda"] == "LORA_KERNELS_CUDA=0"
    assert not libraries
    assert source(CXX=compiler, LORA_KERNELS_CPU="1").returncode != 0


def test_a_launcher_may_stand_before_the_compiler(source, tmp_path):
    compiler = _program(tmp_path / "c++", COMPILER)
    done = source(CXX=f"env LANG=C {compiler}", CXXFLAGS="-DMINE")
    assert "lora_kernels: built with the CPU part" in done.stderr
    assert _built(tmp_path) == ({"cuda": "LORA_KERNELS_CUDA=0"}, {"_cpu.abi3.so"})
    calls = (tmp_path / "calls").read_text()
    assert calls.count("-DMINE") == len(list((ROOT / "csrc" / "cpu").rglob("*.cpp")))
    assert "-Werror" not in calls
    assert "-I" in calls
    assert str(ABI).removeprefix(str(ROOT)) in calls


def test_warnings_are_errors_for_developers_alone(source, tmp_path):
    compiler = _program(tmp_path / "c++", COMPILER)
    assert source(CXX=compiler, LORA_KERNELS_WERROR="1").returncode == 0
    assert "-Werror" in (tmp_path / "calls").read_text()


def test_the_cpu_part_needs_no_torch(source, tmp_path):
    """As in pip's isolated builds."""
    _program(tmp_path / "torch.py", "raise ImportError('isolated')\n")
    compiler = _program(tmp_path / "c++", COMPILER)
    done = source(CXX=compiler, PYTHONPATH=str(tmp_path))
    assert "built with the CPU part" in done.stderr
    assert "_cpu.abi3.so" in _built(tmp_path)[1]


def test_only_what_changed_is_compiled_again(source, tmp_path):
    compiler = _program(tmp_path / "c++", COMPILER)
    calls = tmp_path / "calls"
    counts = []
    for change in (None, None, "csrc/cpu/select.cpp", "csrc/cpu/kernels.h"):
        if change:
            (tmp_path / "source" / change).touch()
        calls.write_text("")
        assert source(CXX=compiler).returncode == 0
        counts.append(calls.read_text().count(" -c "))
    everything = len(list((ROOT / "csrc" / "cpu").rglob("*.cpp")))
    assert counts == [everything, 0, 1, everything]


def _cuda(tmp_path, monkeypatch, version, listed="exit 1"):
    """csrc/cuda/build.py with a stand-in for nvcc."""
    spec = importlib.util.spec_from_file_location("cuda", ROOT / "csrc" / "cuda" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / "cuda"
    (folder / "lib64").mkdir(parents=True)
    (folder / "lib64" / "libcudart_static.a").touch()
    _program(folder / "nvcc", NVCC, version=version, listed=listed)
    _program(folder / "ninja", "#!/bin/sh\nexit 0\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("LORA_KERNELS_CUDA", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return module


def test_the_cuda_part_is_left_out_where_it_could_not_run(tmp_path, monkeypatch):
    import torch

    cuda = _cuda(tmp_path, monkeypatch, "12.4")
    assert cuda.left_out_reason() == "nvcc: expected 12.5 or newer, got 12.4"
    _program(tmp_path / "cuda" / "nvcc", NVCC, version="13.0", listed="exit 1")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "LORA_KERNELS_CUDA=1 builds it all the same" in cuda.left_out_reason()
    monkeypatch.setenv("LORA_KERNELS_CUDA", "1")
    assert cuda.left_out_reason() is None
    monkeypatch.delenv("LORA_KERNELS_CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda.left_out_reason() is None
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "--no-build-isolation" in cuda.left_out_reason()


@pytest.mark.parametrize(
    ("version", "listed", "unknown"),
    [
        ("12.5", "exit 1", ["10.0a", "10.3", "12.0"]),
        ("12.8", "exit 1", ["10.3"]),
        ("12.9", "exit 1", []),
        ("13.1", "exit 1", []),
        ("14.0", "echo compute_90; echo compute_120", ["8.0+PTX", "8.6", "8.9", "10.0a", "10.3"]),
    ],
)
def test_architectures_are_those_that_nvcc_knows(
    tmp_path, monkeypatch, capsys, version, listed, unknown
):
    cuda = _cuda(tmp_path, monkeypatch, version, listed)
    kept = cuda.usable(cuda.ARCHS, cuda.known_archs())
    assert set(kept) == set(cuda.ARCHS.split(";")) - set(unknown)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"lora_kernels: left out architecture {a}: nvcc doesn't know it" for a in unknown
    ]


def test_lists_are_read_as_torch_reads_them(tmp_path, monkeypatch, capsys):
    cuda = _cuda(tmp_path, monkeypatch, "13.0")
    known = cuda.known_archs()
    for archs, expected in (
        ("7.5 8.0 8.6 9.0+PTX", ["8.0", "8.6", "9.0a+PTX"]),
        ("Ampere;Hopper", ["8.0", "8.6+PTX", "9.0a+PTX"]),
        ("8.0, 9.0;", ["8.0", "9.0a"]),
        ("9.0;9.0a", ["9.0a"]),
        ("Blackwell", ["10.0", "10.3", "12.0", "12.1+PTX"]),
        ("Turing", []),
    ):
        assert cuda.usable(archs, known) == expected
    assert "left out architecture 7.5: the kernels need 8.0" in capsys.readouterr().err
    for wrong in ("sm_80", "9", "8.0+ptx", "Fermi"):
        with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST: expected entries like"):
            cuda.usable(wrong, known)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(cuda.BuildError, match="expected entries like"):
            cuda.compile_objects(tmp_path / "objects", [])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    with pytest.raises(cuda.BuildError, match="no architecture is left"):
        cuda.compile_objects(tmp_path / "objects", [])


def test_without_a_list_it_is_built_for_the_gpus_at_hand(tmp_path, monkeypatch):
    import torch

    cuda = _cuda(tmp_path, monkeypatch, "13.0")
    assert cuda.wanted() == cuda.ARCHS
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((8, 0), (9, 0), (8, 7))[i])
    assert cuda.wanted() == "8.0+PTX;8.7;9.0a"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " ")
    assert cuda.wanted() == "8.0+PTX;8.7;9.0a"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
    assert cuda.wanted() == "8.9"


def test_sources_of_sm_90a_are_compiled_for_9_0(tmp_path, monkeypatch):
    cuda = _cuda(tmp_path, monkeypatch, "13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0")
    made = cuda.compile_objects(tmp_path / "objects", [Path("linear_sm90_half.cu"), Path("a.cu")])
    assert [Path(name).name for name in made] == ["linear_sm90_half.o", "a.o"]
    rules = (tmp_path / "objects" / "build.ninja").read_text()
    assert "code=[sm_90a]" in rules
    assert "code=[sm_80,sm_90a]" in rules
    assert "all-warnings" not in rules or os.environ.get("LORA_KERNELS_WERROR") == "1"


def test_absence_names_the_reason_of_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native._left_out("cpu") == "see README.md, Install"
    (tmp_path / "_left_out.json").write_text('{"cpu": "no C++ compiler: c++ is not on PATH"}')
    monkeypatch.setitem(native.LIBRARIES, "cpu", tmp_path / "_cpu.abi3.so")
    reason = native.absence.__wrapped__("cpu")
    assert reason == "not built when the package was installed: no C++ compiler: c++ is not on PATH"
    assert native._left_out("cuda") == "see README.md, Install"


def test_libraries_have_the_names_that_setuptools_gives_them():
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    extensions = [Extension(f"lora_kernels._{part}", [], py_limited_api=True) for part in ("cpu",)]
    command = build_ext(Distribution({"ext_modules": extensions}))
    command.ensure_finalized()
    name = Path(command.get_ext_filename("lora_kernels._cpu")).name
    assert native.LIBRARIES["cpu"].name in (name, os.environ.get("LORA_KERNELS_TEST_LIBRARY"))


# ---- with real compilers ----

BOTH = """
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>
// The same functions declared anew: another signature is an error.
#include "{abi}/torch/csrc/inductor/aoti_torch/c/shim.h"
#include "{abi}/torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h"
#undef STD_TORCH_CHECK
#undef TORCH_ERROR_CODE_CHECK
#define headeronly ours
#include "{abi}/torch/headeronly/util/Exception.h"
#include "{abi}/torch/csrc/stable/tensor.h"
#undef headeronly
#define SAME(name) static_assert(int(c10::ScalarType::name) == int(torch::ours::ScalarType::name));
SAME(Byte) SAME(Short) SAME(Int) SAME(Long) SAME(Half) SAME(Float) SAME(Double) SAME(Bool)
SAME(BFloat16)
"""


def _compile(command, text, tmp_path):
    source = tmp_path / "source.cpp"
    source.write_text(text)
    return subprocess.run([*command, str(source)], capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_declarations_are_those_of_torch(tmp_path):
    from torch.utils.cpp_extension import include_paths

    flags = [flag for path in include_paths() for flag in ("-isystem", path)]
    command = ["c++", "-std=c++20", "-fsyntax-only", *flags]
    done = _compile(command, BOTH.format(abi=ABI), tmp_path)
    assert done.returncode == 0, done.stderr
    wrong = BOTH.format(abi=ABI) + 'extern "C" int aoti_torch_get_dim(int);'
    assert _compile(command, wrong, tmp_path).returncode != 0


KERNELS = sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler", ["clang++", "aarch64-linux-gnu-g++", "clang++ --target=aarch64-linux-gnu"]
)
@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_other_compilers_take_it(compiler, path, tmp_path):
    command = compiler.split()
    if shutil.which(command[0]) is None or (
        "--target" in compiler and not Path("/usr/aarch64-linux-gnu").exists()
    ):
        pytest.skip(f"{compiler} is not there")
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-I", str(ABI), "-o", os.devnull]
    done = subprocess.run([*command, *flags, "-c", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

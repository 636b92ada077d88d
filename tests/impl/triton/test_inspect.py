"""`python -m lora_kernels inspect`: what it compiles, reads from the code, and complains about."""

import json
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lora_kernels.__main__ import main
from lora_kernels.impl.cuobjdump import cuobjdump
from lora_kernels.impl.triton.plan.config import Config, Problem, shared_bytes
from lora_kernels.impl.triton.plan.device import known
from lora_kernels.impl.triton.tools import inspect
from lora_kernels.impl.triton.tools.compiler import Resources, compile_for
from lora_kernels.impl.triton.tools.record import Launch, launches
from tests.support.executors import Machine, needs_compiler, needs_machine

TILE = "128x128x64 8 warps 3 stages"
LOOP = """
$L__BB0_1:
{text}
@%p1 bra $L__BB0_1;
ret;
"""
FROM_SHARED = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1,%f2}, %rd1, %rd2, p, 1;"
FROM_REGISTERS = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16 {%f1,%f2}, {%r1,%r2}, %rd2, p;"


def _job(arch=90, bits=16, **fields):
    problem = Problem(256, 1024, 1024, 16, bits)
    return inspect.Job(arch, problem, Config(128, 128, 64, 8, 3, **fields))


def _faults(job, ptx, spill=0, shared=1000):
    def forward_kernel(): ...

    launch = Launch(forward_kernel, 1, {}, {}, None)
    return "; ".join(inspect.faults(job, launch, Resources(100, spill, shared), ptx))


def test_faults_are_found():
    good = LOOP.format(text=FROM_SHARED)
    assert _faults(_job(), good) == ""
    assert "takes registers in a loop" in _faults(_job(), LOOP.format(text=FROM_REGISTERS))
    assert _faults(_job(), good + FROM_REGISTERS) == ""  # outside of a loop it is defined
    assert "spills 8" in _faults(_job(), good, spill=8)
    assert _faults(_job(80), "mma.sync", spill=64) == ""
    assert "spills 72" in _faults(_job(80), "mma.sync", spill=72)
    assert "shared memory" in _faults(_job(), good, shared=300_000)
    assert "no tcgen05.mma" in _faults(_job(100), good)
    assert "float32 by descriptors" in _faults(_job(100, 32, descriptors=True), "")
    early = "tcgen05.ld.x2 {%r1, %r2}, [%r9];\nmov.b64 %rd1, {%r1, %r2};\ntcgen05.wait::ld;"
    late = "tcgen05.ld.x2 {%r1, %r2}, [%r9];\nadd %r3, %r9;\ntcgen05.wait::ld;\nadd %r1, %r2;"
    assert inspect.reads_before_wait(early)
    assert not inspect.reads_before_wait(late)


def test_loops_are_innermost():
    nested = "$L__BB0_1:\nouter\n$L__BB0_2:\nmma.sync\nmma.sync\nbra.uni $L__BB0_2;\n"
    nested += "bra $L__BB0_1;\nbra $L__BB0_9;\n$L__BB0_9:\nmma.sync"
    assert inspect.matrix_instructions(nested) == ("mma.sync", [2])
    assert inspect.matrix_instructions("fma.rn.f32") == ("fma", [])


def test_resident_programs():
    ampere, hopper = inspect.GPUS[80], inspect.GPUS[90]
    assert inspect.resident(Resources(255, 0, 1000), 8, ampere) == 1
    assert inspect.resident(Resources(128, 0, 1000), 8, ampere) == 2
    assert inspect.resident(Resources(32, 0, 100_000), 4, hopper) == 2
    assert inspect.resident(Resources(32, 0, 0), 4, inspect.GPUS[89]) == 12


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("arch", "only", "kind"),
    [
        (80, f"16-bit {TILE} pointers 1 xa columns", "mma.sync"),
        (90, f"16-bit {TILE} descriptors 1 xa columns", "wgmma.mma_async"),
        (100, f"16-bit {TILE} descriptors 1 xa columns", "tcgen05.mma"),
    ],
)
def test_report_and_dump(arch, only, kind, tmp_path, capsys):
    command = ["inspect", "--arch", str(arch), "--rank", "16", "--only", only]
    command += ["--json", str(tmp_path / "table.json"), "--dump", str(tmp_path / "dump")]
    assert main(command) == 0
    assert "0 with faults; compiled, not run on a GPU" in capsys.readouterr().out
    reports = json.loads((tmp_path / "table.json").read_text())
    assert {r["kernel"] for r in reports} == {"forward_kernel", "backward_kernel"}
    for report in reports:
        assert kind in report["mma"]
        assert report["spill_bytes"] == 0
        assert report["steps"]
        assert report["resident"] >= 1
    manifest = json.loads((tmp_path / "dump" / "manifest.json").read_text())
    assert len(manifest) == len(reports)
    for entry in manifest:
        assert f".entry {entry['entry']}(" in (tmp_path / "dump" / entry["ptx"]).read_text()
        assert (tmp_path / "dump" / entry["cubin"]).stat().st_size > 0
        assert entry["num_warps"] == 8
        assert entry["parameters"][0]["type"] == "*bf16"
        assert entry["constexprs"]["SHAPE"]["N"] == 1024


def test_an_unknown_architecture_is_a_usage_error(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "--arch", "75"])
    assert "invalid choice: 75" in capsys.readouterr().err


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_shared_memory_stays_below_its_bound(arch, steps, backward):
    """Of few steps no loop is left, and Triton would pipeline the one over tiles."""
    config = Config(64, 64, 64, 8, 3, xa_columns=0)
    problem = Problem(128, 128, 128, 256, 16, backward=backward)
    problem = problem._replace(**{"n" if backward else "k": 64 * steps})
    device = inspect.GPUS[arch]
    for launch in launches(problem, config, device):
        compiled = compile_for(arch, *inspect.code_of(launch))
        assert compiled.metadata.shared <= shared_bytes(config, problem, device)


@needs_machine
def test_tiles_from_one_on_are_made():
    """A program makes those of the tickets that are left: how `bench` counts a tile by itself."""
    device = replace(inspect.GPUS[80], multiprocessors=4)
    problem, config = Problem(64, 256, 64, 16, 16), Config(64, 64, 64, 4, 3, xa_columns=1)
    (call,) = launches(problem, config, device)
    out = call.args["out"]
    out.y.fill_(float("nan"))
    out.xa.zero_()
    call.flags[:2] = torch.tensor([9, 3])  # xa is made, three tiles are taken
    Machine(80).run(*call._replace(grid=1))
    assert call.flags[1] == 0
    call.flags.zero_()  # the other consumers would have
    written = ~out.y.isnan()
    assert not written[:, :192].any()
    assert written[:, 192:].all()


@needs_machine
def test_a_producing_tile_takes_more_instructions():
    from bench.suites.kernels import producing_ratio

    config = Config(64, 64, 64, 4, 3, xa_columns=2)
    ratio = producing_ratio(80, Problem(64, 256, 256, 16, 16), config)
    assert 1.05 < ratio < 3


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_dropped_is_rounded_before_the_branch_is_added(dtype, tmp_path):
    """In machine code: PTX had both roundings where an H200 executed the second one alone."""
    problem = Problem(300, 128, 384, 64, 16, backward=True, dropout=True)
    config = Config(64, 128, 64, 8, 3, descriptors=True, xa_columns=1)
    (launch,) = launches(problem, config, known("NVIDIA H200"), dtype)
    cubin = tmp_path / "backward.cubin"
    cubin.write_bytes(compile_for(90, *inspect.code_of(launch)).asm["cubin"])
    pairs = re.findall(r"F2FP\.\S+ R\d+, R(\d+), R(\d+)", cuobjdump("-sass", cubin))
    turned = [first for first, second in pairs if int(second) == int(first) + 1]
    assert len(turned) >= 64 * 128 // (2 * 32 * 8)

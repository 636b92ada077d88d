"""The kernels for sm_90a: their PTX, compiled here, in a virtual machine that models Hopper."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from lora_kernels.impl import executor
from lora_kernels.impl.cuda.tools import machine
from lora_kernels.impl.cuda.tools.machine import Machine
from lora_kernels.impl.executor import using
from lora_kernels.testing import (
    Case,
    assert_parity,
    assert_results,
    float16_range_cases,
    make_inputs,
    run,
)
from tests.support.implementations import needs_compiled_machine
from tests.support.paths import ROOT

SOURCES = ROOT / "csrc" / "cuda" / "instances"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = [
    pytest.mark.many,
    needs_compiled_machine,
]
OPTIONS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-arch=sm_90a", "-w")


@pytest.fixture(scope="module")
def compiled(shared_folder):
    """PTX and ptxas's report of both element types, which one process makes for all."""
    folder, texts, reports = shared_folder / "sm_90a", [], []
    with FileLock(f"{folder}.lock"):
        if not (folder / "half.report").exists():
            folder.mkdir(exist_ok=True)
            _compile(folder)
    for name in ("bf16", "half"):
        reports.append((folder / f"{name}.report").read_text())
        texts.append((folder / f"{name}.ptx").read_text())
    head, bf16 = texts[0].split(".address_size 64")
    return head + ".address_size 64\n" + bf16 + texts[1].split(".address_size 64")[1], reports


def _compile(folder):
    for name in ("bf16", "half"):
        source, out = str(SOURCES / f"linear_sm90_{name}.cu"), str(folder / name)
        subprocess.run(["nvcc", *OPTIONS, source, "-ptx", "-o", f"{out}.ptx"], check=True)
        command = ["ptxas", "-arch=sm_90a", "-v", f"{out}.ptx", "-o", f"{out}.cubin"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        Path(f"{out}.report").write_text(done.stderr)


@pytest.fixture
def hopper(compiled, monkeypatch):
    """A machine's sm_90a, beside the library's own code for sm_80."""
    code = cache(
        lambda target: executor.load(compiled[0] if target == "sm_90a" else machine.ptx(target))
    )
    monkeypatch.setattr(machine, "_code", code)

    def make(**how):
        return Machine(arch=90, shared_bytes=232448, **how)

    return make


def test_compiled_without_spills_by_asynchronous_products(compiled):
    text, reports = compiled
    assert text.count("wgmma.mma_async") > 0
    assert text.count("setmaxnreg.dec") == text.count("setmaxnreg.inc") == 24
    for report in reports:
        assert len(re.findall("Compiling entry function", report)) == 12
        assert set(re.findall(r"(\d+) bytes stack frame", report)) == {"0"}
        assert "setmaxnreg ignored" not in report
        assert "serialize" not in report


CASES = [
    Case((300,), 384, 200, 16, BF16),
    Case((300,), 384, 200, 16, BF16, dropout_p=0.1, bias=True),
    Case((257,), 264, 264, 5, FP16, FP32, 0.1),
    Case((250,), 250, 1096, 8, BF16, bias=True),
    Case((120,), 512, 512, 64, FP16, dropout_p=0.1),
    Case((300,), 384, 384, 24, BF16, FP32, 0.1, bias=True),
    Case((2, 150), 248, 376, 1, BF16, dropout_p=0.1),
    Case((383,), 251, 328, 50, FP16, bias=True),
    Case((2200,), 128, 120, 16, FP16, dropout_p=0.1, bias=True),
]


def _twice_on_the_same_flags(hopper, case, resident):
    """Check a case, and that its flags are left as found; return the machine."""
    made = hopper(resident=resident, seed=resident, zeros=torch.zeros(4096, dtype=torch.int32))
    with using(made):
        for _ in range(2):
            assert_parity(case, make_inputs(case), "cuda")
    assert not made.zeros.any()
    return made


@pytest.mark.parametrize("resident", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(hopper, case, resident):
    made = _twice_on_the_same_flags(hopper, case, resident)
    for direction, whole in (("forward", True), ("backward", case.n % 8 == 0)):
        names = [name for name, _ in made.stats if direction in name]
        assert len(names) == 2
        # Rows of dy that aren't multiples of 16 bytes can't be copied in boxes.
        assert all(("_Hopper" in name) == whole for name in names)


@pytest.mark.parametrize("resident", [1, 2, 9])
@pytest.mark.parametrize(
    "case",
    [
        Case((300,), 520, 520, 16, BF16),
        Case((300,), 520, 632, 8, BF16, dropout_p=0.1, bias=True),
        Case((257,), 520, 520, 5, FP16, FP32, 0.1),
        Case((2, 150), 504, 632, 1, FP16, dropout_p=0.1, bias=True),
        Case((300,), 507, 392, 16, FP16, bias=True),
    ],
    ids=str,
)
def test_wide_tiles(hopper, case, resident):
    """Of nine programs so many run at once, on weak memory."""
    flags = torch.zeros(1024, dtype=torch.int32)
    how = {"multiprocessors": 9, "zeros": flags, "weak": 2, "seed": resident}
    with using(made := hopper(resident=resident, **how)):
        assert_parity(case, make_inputs(case), "cuda")
    assert not flags.any()
    assert made.stats[0][0].split("_")[1:3] == ["forward", "HopperWide"]
    assert len(made.stats) == 2
    # Rows of dy that aren't multiples of 16 bytes can't be copied in boxes.
    assert ("_backward_HopperWide_" in made.stats[1][0]) == (case.n % 8 == 0)


@pytest.mark.parametrize("resident", [4, 5])
@pytest.mark.parametrize(
    "case",
    [
        Case((300,), 264, 392, 100, BF16, FP32, 0.1, bias=True),
        Case((150,), 520, 512, 256, FP16, dropout_p=0.1),
        Case((150,), 512, 520, 250, BF16),
    ],
    ids=str,
)
def test_ranks_in_slices(hopper, case, resident):
    """Each of the first columns of tiles makes a slice of xa or dxa."""
    made = _twice_on_the_same_flags(hopper, case, resident)
    assert [name.split("_")[1:3] for name, _ in made.stats] == [
        ["forward", "Hopper"],
        ["backward", "Hopper"],
    ] * 2


@pytest.mark.parametrize("resident", [1, 2, 3, 9])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
def test_any_number_of_running_programs_makes_progress(hopper, dropout_p, resident):
    """Of nine that are launched; on weak memory, by several schedules, on the same flags."""
    flags = torch.zeros(1024, dtype=torch.int32)
    how = {"multiprocessors": 9, "zeros": flags, "weak": 2}
    for rank in (16, 100):
        case = Case((400,), 256, 520, rank, BF16, dropout_p=dropout_p, bias=True)
        # Two columns of tiles make a shrink product of two slices of ranks together.
        with using(made := hopper(resident=max(resident, rank // 50), seed=resident, **how)):
            assert_parity(case, make_inputs(case), "cuda")
        assert all("_Hopper" in name for name, _ in made.stats)
    assert not flags.any()


@pytest.mark.parametrize("index", range(len(float16_range_cases((), 1, 1, 1))))
def test_float16_range(hopper, index):
    """Three row panels of dxa, of one slice of ranks or, every third time, of two."""
    case = float16_range_cases((300,), 136, 264, 16 if index % 3 else 96)[index]
    with using(made := hopper(resident=3, seed=index)):
        assert_parity(case, make_inputs(case), "cuda")
    assert all("_Hopper" in name for name, _ in made.stats)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
def test_two_runs_give_the_same_bits(hopper, dropout_p):
    """Sums over rows are of three segments here, whichever of them is finished last."""
    case = Case((4300,), 128, 120, 16, BF16, FP32, dropout_p, bias=True)
    inputs = make_inputs(case)
    results = []
    for seed, resident in ((1, 2), (9, 5), (4, 5)):
        with using(made := hopper(resident=resident, seed=seed)):
            results.append(run(case, inputs, "cuda"))
        assert all("_Hopper_" in name for name, _ in made.stats)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert torch.equal(value, results[2][name]), name


@pytest.mark.parametrize("needed", [(), ("da",), ("db", "dbias"), ("dbias",)], ids="+".join)
def test_gradients_beside_dx(hopper, needed):
    case = Case((300,), 136, 264, 16, BF16, dropout_p=0.1, bias=True)
    inputs = make_inputs(case)
    made = hopper(resident=3, zeros=torch.zeros(4096, dtype=torch.int32))
    with using(made):
        actual = run(case, inputs, "cuda", ("dx", *needed))
    assert_results(case, inputs, actual, "cuda")
    assert not made.zeros.any()
    assert "_backward_Hopper_" in made.stats[-1][0]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize(("shape", "programs"), [("HopperWide", 2), ("Hopper", 3)])
def test_no_bank_conflicts_and_whole_sectors_stored(hopper, shape, programs, dropout_p):
    made = hopper(resident=2, multiprocessors=programs)
    case = Case((256,), 512, 512, 16, BF16, dropout_p=dropout_p)
    with using(made):
        run(case, make_inputs(case), "cuda", ("dx",))
    assert len(made.stats) == 2
    for name, stats in made.stats:
        assert f"_{shape}_" in name
        assert stats.shared_bank_conflicts == 0, name
        # The machine counts what boxes store by sixteen bytes, a sector each.
        boxes = 2 * 256 * 512
        sectors = stats.global_store_sectors - boxes // 16
        assert stats.global_store_bytes - boxes > 0.95 * 32 * sectors, name


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p{}".format)
def test_sums_over_more_rows_have_no_more_bank_conflicts(hopper, dropout_p):
    """Results of sums are put in order with a few; their loop has none."""
    conflicts = []
    for rows in (256, 768):
        made = hopper(resident=2)
        case = Case((rows,), 256, 256, 16, BF16, dropout_p=dropout_p)
        with using(made):
            run(case, make_inputs(case), "cuda")
        name, stats = made.stats[-1]
        assert "_backward_HopperWide_" in name
        conflicts.append(stats.shared_bank_conflicts)
    assert conflicts[0] == conflicts[1]
